"""The devices that a cheapest matching can need: one shortlist for all solvers.

Let a round have S slots, devices that its blocks need in all, and let each (device,
block) pair cost something. Only the S cheapest devices of each block matter: if a
cheapest matching gives some block another device, then at most S - 1 of these are busy
elsewhere, so one of them is free, no dearer, and can take over. The same holds for the
matching whose dearest pair is cheapest, and for the question whether there is any.

Where all devices take part, nobody can be left out.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lola_flwr.allocation.edges import Edges, edges_of
from lola_flwr.allocation.problem import AllocationProblem
from lola_flwr.arrays import Float64Array, IntArray

# Fleets up to this size are solved whole; pruning costs more than it saves there.
_WHOLE_FLEET = 256

# Rows of one step of a pass over all devices: its tables stay in the CPU's cache.
_ROWS_A_STEP = 4096

Cost = Callable[[Edges], Float64Array]


def is_whole(problem: AllocationProblem) -> bool:
    """Whether the shortlist has all devices, whatever the pairs cost."""
    return problem.all_devices or problem.num_devices <= _WHOLE_FLEET


def shortlist(problem: AllocationProblem, cost: Cost) -> Edges:
    """Edges of the devices that are among the S cheapest of some block.

    Of devices that cost the same the first ones are cheapest. Time and memory are
    linear in the number of devices.

    Parameters
    ----------
    problem
        The instance.
    cost
        What each of some edges costs, shape (k, n); infinite where there is none.
    """
    if is_whole(problem):
        return edges_of(problem)
    slots = int(problem.demand.sum())
    table: Float64Array | None = None  # [k, n] costs of
    devices: IntArray = np.empty(0, dtype=np.int64)  # [k]
    limit: Float64Array | float = np.inf  # of each block: S-th least cost so far
    for first in range(0, problem.num_devices, _ROWS_A_STEP):
        costs = cost(edges_of(problem, slice(first, first + _ROWS_A_STEP)))
        better = np.unique(np.flatnonzero(costs < limit) // costs.shape[1])
        if not better.size:
            continue
        devices = np.concatenate([devices, first + better])
        costs = costs[better]
        table = costs if table is None else np.concatenate([table, costs])
        if len(table) > slots:
            kept, limit = _among_cheapest(table, slots)
            devices, table = devices[kept], table[kept]
    return edges_of(problem, devices)


def _among_cheapest(table: Float64Array, count: int) -> tuple[IntArray, Float64Array]:
    """Rows that are among the cheapest of some column, and each one's dearest."""
    limit: Float64Array = np.partition(table, count - 1, axis=0)[count - 1]
    among = table < limit
    equal = (table == limit) & (limit < np.inf)
    missing = count - np.count_nonzero(among, axis=0)
    among |= equal & (np.cumsum(equal, axis=0) <= missing)
    return np.flatnonzero(among.any(axis=1)), limit
