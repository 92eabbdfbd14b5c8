"""The devices that a cheapest matching can need: one shortlist for all solvers.

Let a round have S slots, devices that its blocks need in all, and let each (device,
block) pair cost something. Only the S cheapest devices of each block matter: if a
cheapest matching gives some block another device, then at most S - 1 of these are busy
elsewhere, so one of them is free, no dearer, and can take over. The same holds for the
matching whose dearest pair is cheapest, and for the question whether there is any.

Where all devices take part, nobody can be left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from lola_flwr.allocation.edges import Edges, edges_of
from lola_flwr.allocation.problem import AllocationProblem
from lola_flwr.arrays import BoolArray, Float64Array, IntArray

# Fleets up to this size are solved whole; pruning costs more than it saves there.
_WHOLE_FLEET = 256

# Rows of one step of a pass over all devices: its tables stay in the CPU's cache.
_ROWS_A_STEP = 2048

Cost = Callable[[Edges], Float64Array]


def is_whole(problem: AllocationProblem) -> bool:
    """Whether the shortlist has all devices, whatever the pairs cost."""
    return problem.all_devices or problem.num_devices <= _WHOLE_FLEET


def shortlist(problem: AllocationProblem, cost: Cost) -> Edges:
    """Edges of the devices that are among the S cheapest of some block.

    Parameters
    ----------
    problem
        The instance.
    cost
        What each of some edges costs, shape (k, n); infinite where there is none.
    """
    if is_whole(problem):
        return edges_of(problem)
    devices, _ = cheapest_rows(
        lambda rows: cost(edges_of(problem, rows)),
        problem.num_devices,
        int(problem.demand.sum()),
    )
    return edges_of(problem, devices)


def cheapest_rows(
    cost: Callable[[slice], Float64Array], num_rows: int, count: int
) -> tuple[IntArray, Float64Array]:
    """Rows of a table that are among so many cheapest of some column, rising.

    Of rows that cost the same the first ones are cheapest. Time and memory are linear
    in the number of rows.

    Parameters
    ----------
    cost
        Some rows of the table.
    num_rows
        How many there are in all.
    count
        How many are wanted for each column.

    Returns
    -------
    The rows, and what all others cost at least in each column.
    """
    found: list[tuple[IntArray, Float64Array]] = []  # rows and their costs
    limit: Float64Array | float = np.inf
    held, most = 0, count  # rows, and how many until some are left out again
    for step in steps(num_rows):
        costs = cost(step)
        better = rows_with_any(costs < limit)
        found.append((step.start + better, costs[better]))
        held += better.size
        if held > most or (held > count and step.stop >= num_rows):
            rows, table = map(np.concatenate, zip(*found, strict=True))
            kept, limit = _among_cheapest(table, count)
            found = [(rows[kept], table[kept])]
            held, most = kept.size, kept.size + count
    rows = np.concatenate([rows for rows, _ in found])
    return rows, np.broadcast_to(limit, costs.shape[1:])


def steps(num_rows: int) -> Iterator[slice]:
    """Cut a pass over all rows into steps."""
    for first in range(0, num_rows, _ROWS_A_STEP):
        yield slice(first, first + _ROWS_A_STEP)


def rows_with_any(table: BoolArray) -> IntArray:
    """Rows of a table that is mostly false in which something is true."""
    if table.flags.f_contiguous:
        return np.flatnonzero(table.any(axis=1))
    # Many times as fast where rows are short.
    found: BoolArray = np.zeros(len(table), dtype=np.bool_)
    found[np.flatnonzero(table) // table.shape[1]] = True
    return np.flatnonzero(found)


def _among_cheapest(table: Float64Array, count: int) -> tuple[IntArray, Float64Array]:
    """Rows that are among the cheapest of some column, and each one's dearest."""
    limit: Float64Array = np.partition(table, count - 1, axis=0)[count - 1]
    among = table < limit
    equal = (table == limit) & (limit < np.inf)
    missing = count - np.count_nonzero(among, axis=0)
    if (np.count_nonzero(equal, axis=0) > missing).any():
        equal &= np.cumsum(equal, axis=0) <= missing
    among |= equal
    return np.flatnonzero(among.any(axis=1)), limit
