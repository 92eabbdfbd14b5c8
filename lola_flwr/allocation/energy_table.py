"""What pairs of device and block take by a deadline: energy, time and band."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from lola_flwr.allocation.edges import Edges, edges_of
from lola_flwr.allocation.energy_shares import least_level, worst_shares
from lola_flwr.allocation.exact import solve_exact
from lola_flwr.allocation.joules import EnergyCosts
from lola_flwr.allocation.matching import Matching
from lola_flwr.allocation.problem import AllocationProblem
from lola_flwr.allocation.shares import with_shares
from lola_flwr.allocation.solution import Allocation, InfeasibleAllocation
from lola_flwr.arrays import Float64Array, IntArray
from lola_flwr.errors import UserError

# Energies, and times, are told apart to this, relative.
ACCURACY = 1e-9

_LONGEST_LIST = 8


@dataclass(frozen=True, eq=False)
class EnergyTable:
    """What the pairs of a round take; k devices and n blocks, as in `Edges`."""

    problem: AllocationProblem
    edges: Edges
    shortest: Matching  # rows and columns of the shortest round
    shortest_s: float
    time_s: Float64Array  # [k, n] left for the upload
    compute_j: Float64Array  # [k, n]
    transmit_w: Float64Array  # [k, 1]
    least: Float64Array  # [k, n] share by the deadline; infinite where none will do

    @classmethod
    def of(
        cls, problem: AllocationProblem, slack: float, longest_s: float
    ) -> EnergyTable:
        """Return what a problem's pairs take within a deadline; see `solve_energy`."""
        if not slack >= 0.0:
            raise UserError(f"slack must be at least 0, but is {slack}.")
        energy = _known(problem)
        shortest = solve_exact(problem)
        if longest_s < shortest.round_s * (1.0 - ACCURACY):
            raise InfeasibleAllocation(
                f"No round ends within longest_s={longest_s:g} s: the shortest takes "
                f"{shortest.round_s:.3g} s. Allow more, or train fewer blocks."
            )
        edges = edges_of(problem)
        allowed_s = min((1.0 + slack) * shortest.round_s, longest_s)
        # Of the shortest round itself nothing is to be lost by rounding.
        deadline_s = max(allowed_s, shortest.round_s) * (1.0 + 1e-12)
        time_s = deadline_s - problem.constant_s - edges.compute_s
        compute_j = energy.compute_j[np.ix_(edges.devices, edges.blocks)]
        transmit_w = energy.transmit_w[edges.devices, np.newaxis]
        active = np.flatnonzero(shortest.block_of_device >= 0)
        place = np.searchsorted(edges.blocks, shortest.block_of_device[active])
        return cls(
            problem=problem,
            edges=edges,
            shortest=(active, place),
            shortest_s=shortest.round_s,
            time_s=time_s,
            compute_j=compute_j,
            transmit_w=transmit_w,
            least=worst_shares(
                compute_j,
                transmit_w,
                edges.full_band_upload_s,
                time_s,
                math.inf,
                edges.snr,
            ),
        )

    def of_rows(self, rows: IntArray, matching: Matching) -> EnergyTable:
        """Return the same for some rows, and a matching of theirs in `shortest`."""
        edges = self.edges
        return replace(
            self,
            edges=replace(
                edges,
                devices=edges.devices[rows],
                compute_s=edges.compute_s[rows],
                full_band_upload_s=edges.full_band_upload_s[rows],
                snr=None if edges.snr is None else edges.snr[rows],
            ),
            shortest=matching,
            time_s=self.time_s[rows],
            compute_j=self.compute_j[rows],
            transmit_w=self.transmit_w[rows],
            least=self.least[rows],
        )

    @property
    def full_band_j(self) -> Float64Array:
        """Energy of each upload over the whole band, [k, n]."""
        return self.transmit_w * self.edges.full_band_upload_s

    def worst_shares(self, level_j: float) -> Float64Array:
        """Least shares within the deadline and a level of energy, [k, n]."""
        return worst_shares(
            self.compute_j,
            self.transmit_w,
            self.edges.full_band_upload_s,
            self.time_s,
            level_j,
            self.edges.snr,
        )

    def least_level(self, matching: Matching) -> float:
        """Least level of a matching; infinite where it does not keep the deadline."""
        rows = matching[0]
        snr = self.edges.snr
        return least_level(
            self.compute_j[matching],
            self.transmit_w[rows, 0],
            self.edges.full_band_upload_s[matching],
            self.time_s[matching],
            None if snr is None else snr[rows, 0],
        )

    def allocation(
        self,
        matching: Matching,
        share: Float64Array,
        *,
        bound_j: float,
        iterations: int,
        stop_reason: str,
    ) -> Allocation:
        """Return the allocation of a matching, with all of the band given out."""
        rows, columns = matching
        allocation = with_shares(
            self.problem,
            self.edges.devices[rows],
            self.edges.blocks[columns],
            share,
            iterations=iterations,
            stop_reason=stop_reason,
            bound_j=bound_j,
        )
        # By less than rounding it may be shorter than the shortest.
        return replace(allocation, bound_s=min(self.shortest_s, allocation.round_s))


def _known(problem: AllocationProblem) -> EnergyCosts:
    """Return the problem's energy; refuse one in which some is not known."""
    energy = problem.energy
    unknown = np.arange(problem.num_devices)
    if energy is not None:
        unknown = np.flatnonzero(energy.unknown)
        if not unknown.size:
            return energy
    names = [problem.name_of(int(device)) for device in unknown[:_LONGEST_LIST]]
    more = unknown.size - len(names)
    raise UserError(
        "An energy allocator has to know what devices draw, and these do not say: "
        f"{', '.join(names)}{f' and {more} more' if more else ''}. State "
        "compute-power-w and transmit-power-w, in watts, in their profiles; fleets of "
        "`lola-flwr fleet generate 6 --power` do."
    )
