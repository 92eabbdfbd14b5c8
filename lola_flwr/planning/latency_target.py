"""The most valuable blocks that a round can finish in time, exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lola_flwr.allocation import (
    AllocationProblem,
    InfeasibleAllocation,
    RoundMode,
    allocate,
)
from lola_flwr.allocation.edges import Edges, edges_of
from lola_flwr.arrays import Float64Array, IntArray
from lola_flwr.errors import UserError


def most_valuable_blocks(
    problem: AllocationProblem,
    values: Sequence[float] | Float64Array,
    *,
    latency_target_s: float = math.inf,
) -> tuple[int, ...]:
    """Choose the blocks of the largest total value that fit a round together.

    Parameters
    ----------
    problem
        The round's problem; its mode names the blocks to choose from, and how many
        devices each needs.
    values
        Value of each block, positive, shape [N].
    latency_target_s
        Time that the round may take under the best allocation, seconds; infinite: only
        memory and the number of devices limit the choice.

    Returns
    -------
    The chosen blocks, from the input to the output.

    Raises
    ------
    InfeasibleAllocation
        Not even one block fits; the message names the fastest.
    UserError
        A value is not positive, or all devices are to take part: then a round can only
        become faster by leaving devices out, not blocks.

    Notes
    -----
    For a deadline T each (device, block) pair needs a share ``w = tau / (T - c)`` of
    the band, and blocks fit if some matching of them costs at most 1 in all. The
    largest value is an integer program over the pairs: an assignment with one more
    constraint, the band. It is solved to optimality by HiGHS, whose constraints hold to
    a tolerance; so the answer is checked against the exact allocator, and a set that
    misses the target by rounding is forbidden, and the program solved again.

    Of each block only as many of its cheapest pairs matter as devices are needed in
    all: of so many one is always free, and no dearer than any other.
    """
    worth = np.asarray(values, dtype=np.float64)
    if worth.shape != (problem.num_blocks,) or not (worth > 0).all():
        raise UserError(
            f"values must be {problem.num_blocks} positive numbers, one a block, but "
            f"are {worth.tolist()}."
        )
    if problem.all_devices:
        raise UserError(
            "Blocks cannot be left out of a round in which all devices take part; set "
            "participation='needed'."
        )
    time_s = latency_target_s - problem.constant_s
    edges = edges_of(problem)
    in_time = edges.possible & (edges.latency_s(1.0) <= time_s)
    # An impossible pair computes forever: inf - inf, where the target is infinite, too.
    with np.errstate(invalid="ignore"):
        share = np.where(in_time, edges.least_share(time_s), np.inf)  # [k, n]
    program = _Program(share, edges.demand, worth[edges.blocks])
    forbidden: list[IntArray] = []
    while (columns := program.solve(forbidden)) is not None:
        chosen = tuple(int(block) for block in edges.blocks[columns])
        best = allocate(replace(problem, mode=_only(problem, chosen)), "exact")
        # The allocator's own accuracy is that of its latency.
        if best.round_s <= latency_target_s * (1 + 1e-9):
            return chosen
        forbidden.append(columns)
    raise _nothing_fits(problem, edges, latency_target_s)


class _Program:
    """The integer program: pairs x [E] and blocks y [n], all of them 0 or 1."""

    def __init__(
        self, share: Float64Array, demand: IntArray, worth: Float64Array
    ) -> None:
        kept = np.isfinite(share)
        slots = int(demand.sum())
        if share.shape[0] > slots:
            dear = np.argpartition(share, slots - 1, axis=0)[slots:]
            np.put_along_axis(kept, dear, False, axis=0)
        self._rows, self._columns = np.nonzero(kept)
        self._share = share[self._rows, self._columns]
        self._demand, self._worth = demand, worth

    def solve(self, forbidden: Sequence[IntArray]) -> IntArray | None:
        """Return the columns of the best set; None where only the empty one is left.

        Parameters
        ----------
        forbidden
            Sets of columns that are no answer.
        """
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import coo_array, csr_array, hstack

        pairs, num_blocks = self._rows.size, self._worth.size
        if pairs == 0:
            return None
        ones, number = np.ones(pairs), np.arange(pairs)
        served = coo_array((ones, (self._columns, number)), shape=(num_blocks, pairs))
        devices = np.unique(self._rows, return_inverse=True)[1]
        busy = coo_array((ones, (devices, number)))
        needed = csr_array(np.diag(-self._demand.astype(np.float64)))
        cuts = np.full((len(forbidden), num_blocks), -1.0)
        for row, columns in enumerate(forbidden):
            cuts[row, columns] = 1.0
        band = np.concatenate([self._share, np.zeros(num_blocks)])
        nothing = csr_array((busy.shape[0], num_blocks))
        constraints = [
            LinearConstraint(hstack([served, needed]), 0, 0),
            LinearConstraint(hstack([busy, nothing]), -np.inf, 1),
            LinearConstraint(band[np.newaxis], -np.inf, 1),
        ]
        if forbidden:
            sizes = np.array([columns.size for columns in forbidden])
            no_pairs = np.zeros((len(forbidden), pairs))
            constraints.append(
                LinearConstraint(np.hstack([no_pairs, cuts]), -np.inf, sizes - 1)
            )
        cost = np.concatenate([np.zeros(pairs), -self._worth / self._worth.max()])
        found = milp(
            cost,
            integrality=np.ones(cost.size, np.int64),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": 0.0},
        )
        if found.x is None:
            raise RuntimeError(f"HiGHS found no set of blocks: {found.message}")
        columns = np.flatnonzero(found.x[pairs:] > 0.5)
        return columns if columns.size else None


def _only(problem: AllocationProblem, blocks: Sequence[int]) -> RoundMode:
    return replace(problem.mode, blocks=blocks, backups=0)


def _nothing_fits(
    problem: AllocationProblem, edges: Edges, latency_target_s: float
) -> InfeasibleAllocation:
    """Error that names the block that a round could finish first."""
    enough = edges.possible.sum(axis=0) >= edges.demand
    if not enough.any():
        return InfeasibleAllocation(
            "No block of this round can be computed by as many devices as it needs "
            f"({problem.num_devices} are there). Lower the batch size, or add devices "
            "with more memory."
        )
    alone = {
        int(block): allocate(replace(problem, mode=_only(problem, [int(block)])))
        for block in edges.blocks[enough]
    }
    fastest = min(alone, key=lambda block: alone[block].round_s)
    return InfeasibleAllocation(
        f"No block fits latency_target_s={latency_target_s:g} s: the fastest, block "
        f"{fastest}, takes {alone[fastest].round_s:.3g} s by itself. Raise the target."
    )
