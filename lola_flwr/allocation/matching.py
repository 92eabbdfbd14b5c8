"""Matchings of devices to blocks: the cheapest one, and any one at all.

A matching is a pair of index arrays into the rows and columns of a (k, n) table, one
entry for every active device. A block that needs several devices counts as so many
slots, copies of its column, so that each slot takes one device.
"""

from __future__ import annotations

import numpy as np

from lola_flwr.allocation.transport import cheapest_blocks
from lola_flwr.arrays import BoolArray, Float64Array, IntArray

Matching = tuple[IntArray, IntArray]

# Tables with more rows than this per slot are pruned before the assignment.
_ROWS_PER_SLOT = 64

# From so many slots on, those of one block are not told apart.
_MANY_SLOTS = 128


def slots_of(demand: IntArray) -> IntArray:
    """Column of each slot, shape (sum of demand,)."""
    return np.repeat(np.arange(demand.size), demand)


def cheapest_matching(
    cost: Float64Array, demand: IntArray, *, all_devices: bool
) -> tuple[Matching, float] | None:
    """Find the matching of the least total cost, by the Hungarian method.

    Parameters
    ----------
    cost
        Cost of each edge, shape (k, n); infinite where there is none.
    demand
        Devices that each block needs, shape (n,).
    all_devices
        Whether every device takes part, each in exactly one block.

    Returns
    -------
    The matching and its total cost; None if the infinite costs leave no matching.

    Notes
    -----
    With `all_devices` each slot needs one device and the others go where they cost
    least, so the total is the sum of every device's least cost plus, for the device
    that fills a slot, what that slot costs more than its least cost: an assignment on
    these reduced costs.
    """
    if len(cost) < demand.sum():
        return None
    if not all_devices:
        assigned = _fill(cost, demand)
        if assigned is None:
            return None
        return assigned, float(cost[assigned].sum())
    least = cost.min(axis=1)
    if not np.isfinite(least).all():
        return None
    reduced = cost - least[:, np.newaxis]  # [k, n] - [k, 1]
    assigned = _fill(reduced, demand)
    if assigned is None:
        return None
    rows, filled = assigned
    columns = cost.argmin(axis=1)
    columns[rows] = filled
    everyone = np.arange(cost.shape[0])
    return (everyone, columns), float(cost[everyone, columns].sum())


def _fill(cost: Float64Array, demand: IntArray) -> Matching | None:
    """Cheapest way to give every column as many rows as it needs; None if none."""
    if demand.max() == 1 == demand.min():
        return _assign(cost)
    slots = slots_of(demand)
    if slots.size > _MANY_SLOTS:
        near = _near(cost, slots.size)
        columns = cheapest_blocks(cost[near], demand)
        if columns is not None:
            rows = np.flatnonzero(columns < demand.size)
            return np.arange(len(cost))[near][rows], columns[rows]
    assigned = _assign(cost[:, slots])
    if assigned is None:
        return None
    rows, filled = assigned
    return rows, slots[filled]


def _assign(cost: Float64Array) -> Matching | None:
    """Cheapest assignment of every column to a row; None if there is none."""
    # scipy.optimize takes longer to import than the rest of the package together.
    from scipy.optimize import linear_sum_assignment

    near = _near(cost, cost.shape[1])
    try:
        rows, columns = linear_sum_assignment(cost[near])
    except ValueError as error:
        if "infeasible" not in str(error):
            raise
        return None
    return (rows if isinstance(near, slice) else near[rows]), columns


def _near(cost: Float64Array, num_slots: int) -> IntArray | slice:
    """Rows that matter: those that are among the cheapest of some column.

    Only as many of each as there are slots: if a column had another row, one of these
    would be free and no dearer.
    """
    if len(cost) <= _ROWS_PER_SLOT * num_slots:
        return slice(None)
    return np.unique(np.argpartition(cost, num_slots - 1, axis=0)[:num_slots])


def any_matching(edges: BoolArray, demand: IntArray) -> IntArray:
    """Device of each slot in a largest matching, by Hopcroft and Karp's method.

    Parameters
    ----------
    edges
        Whether a device may take a block, shape (k, n).
    demand
        Devices that each block needs, shape (n,).

    Returns
    -------
    Row of each slot of `slots_of(demand)`, -1 for a slot that stays empty.
    """
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import maximum_bipartite_matching

    graph = csr_array(edges[:, slots_of(demand)])
    return maximum_bipartite_matching(graph, perm_type="row").astype(np.int64)
