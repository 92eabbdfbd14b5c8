"""Rounds that take least energy within a deadline: the fleet's, or the worst device's.

Both let a round be a little longer than the shortest, and so need `solve_exact` first.

The worst device's energy is bounded like the latency: for a level E a pair needs the
share with which it ends by the deadline and takes at most E, and a level is achievable
if and only if the cheapest matching under these shares needs at most the whole band.
From any matching's own least level the next one is better, or it is the optimum.

The fleet's energy is a sum, which one constraint ties together, the band: see
`lola_flwr.allocation.energy_search`.
"""

from __future__ import annotations

import math

from lola_flwr.allocation.energy_search import least_energy
from lola_flwr.allocation.energy_shares import WHOLE_BAND, least_sum_shares
from lola_flwr.allocation.energy_table import ACCURACY, EnergyTable
from lola_flwr.allocation.matching import cheapest_matching
from lola_flwr.allocation.problem import AllocationProblem
from lola_flwr.allocation.solution import Allocation
from lola_flwr.errors import UserError


def solve_energy(
    problem: AllocationProblem,
    *,
    slack: float = 0.1,
    longest_s: float = math.inf,
    max_parts: int = 100,
) -> Allocation:
    """Find the allocation that takes the fleet least energy within a deadline.

    Parameters
    ----------
    problem
        The instance, with ``energy``, in any mode.
    slack
        Relative latency that may be given up: the round may take ``1 + slack`` times
        the shortest one's.
    longest_s
        How long it may take in any case, seconds.
    max_parts
        Largest number of parts that the matchings are divided into.

    Returns
    -------
    The optimum, with ``bound_j`` equal to its energy. If the parts run out first, the
    best allocation found, with a proven bound and the stop reason "gap". ``bound_s`` is
    the shortest round's latency.

    Raises
    ------
    InfeasibleAllocation
        If no matching exists, or none ends within ``longest_s``; says why.
    UserError
        Of a device it is not known what it draws, or devices are power-limited.
    """
    if problem.power_limited is not None:
        raise UserError(
            "allocator='energy' knows devices of uniform power per sub-carrier, not "
            "power-limited ones; use 'energy-worst', or 'exact'."
        )
    found = least_energy(EnergyTable.of(problem, slack, longest_s), max_parts)
    table, matching = found.table, found.matching
    share, _ = least_sum_shares(table.full_band_j[matching], table.least[matching])
    return table.allocation(
        matching,
        share,
        bound_j=found.bound_j,
        iterations=found.iterations,
        stop_reason="optimal" if found.bound_j == found.energy_j else "gap",
    )


def solve_energy_worst(
    problem: AllocationProblem, *, slack: float = 0.1, longest_s: float = math.inf
) -> Allocation:
    """Find the allocation in which the worst device takes least energy.

    Parameters and errors are those of `solve_energy`; devices may be power-limited.

    Returns
    -------
    The optimum, with ``bound_j`` equal to the worst device's energy. What is left of
    the band is given out in proportion.
    """
    table = EnergyTable.of(problem, slack, longest_s)
    edges = table.edges
    matching, iterations = table.shortest, 0
    level_j = table.least_level(matching)
    while True:
        iterations += 1
        lower_j = level_j * (1.0 - ACCURACY)
        found = cheapest_matching(
            table.worst_shares(lower_j), edges.demand, all_devices=edges.all_devices
        )
        if found is None or found[1] > WHOLE_BAND:
            break
        next_j = table.least_level(found[0])
        if not next_j < level_j:
            break
        matching, level_j = found[0], next_j
    return table.allocation(
        matching,
        table.worst_shares(level_j)[matching],
        bound_j=level_j,
        iterations=iterations,
        stop_reason="optimal",
    )
