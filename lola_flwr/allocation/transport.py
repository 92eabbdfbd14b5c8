"""The cheapest matching where blocks need many devices each: a transportation problem.

To the Hungarian method a block that needs 40 devices is 40 blocks. Here it stays one: a
matching is the cheapest if and only if no devices can move between blocks in a circle
(device k from its block to that of device l, l to the next, and so on) and thereby cost
less. That is a question to a graph of the blocks alone, whose edges are the cheapest
moves. Where there is such a circle, its devices and those that are nearest to moving
are matched anew by the Hungarian method, all others stay, and so on until there is
none.

To be idle is one block more, at no cost.
"""

from __future__ import annotations

import numpy as np

from lola_flwr.arrays import Float64Array, IntArray

# Devices that are matched anew at a time: the Hungarian method takes their third power.
_AT_ONCE = 96

# What is less than this, relative, is rounding and no gain.
_ROUNDING = 1e-15


def cheapest_blocks(cost: Float64Array, demand: IntArray) -> IntArray | None:
    """Find the cheapest matching.

    Parameters
    ----------
    cost
        Cost of each edge, shape (k, n); infinite where there is none.
    demand
        Devices that each block needs, in all no more than there are, shape (n,).

    Returns
    -------
    Each device's block, n if it has none, shape (k,); None if the infinite costs leave
    no matching.
    """
    from scipy.optimize import linear_sum_assignment

    num_devices, num_blocks = cost.shape
    finite = np.isfinite(cost)
    # No matching of possible pairs costs as much as one of the others.
    dearest = np.abs(np.where(finite, cost, 0.0)).max(axis=1).sum()
    table = np.zeros((num_devices, num_blocks + 1))
    table[:, :-1] = np.where(finite, cost, 2.0 * dearest + 1.0)
    block = _first_blocks(table, demand)
    everyone = np.arange(num_devices)
    while True:
        own = table[everyone, block]
        some = _nearest_to_moving(table, block, own)
        if some is None:
            break
        _, held = linear_sum_assignment(table[np.ix_(some, block[some])])
        moved = block[some][held]
        gain = (own[some] - table[some, moved]).sum()
        if not gain > _ROUNDING * own[some].sum():
            break
        block[some] = moved
    used = np.flatnonzero(block < num_blocks)
    return block if finite[used, block[used]].all() else None


def _nearest_to_moving(
    table: Float64Array, block: IntArray, own: Float64Array
) -> IntArray | None:
    """Return devices of which some move in a circle and others may; None if none do."""
    num_devices, num_blocks = table.shape
    order = np.argsort(block, kind="stable")
    extra = table[order] - own[order, np.newaxis]  # what a move costs
    present, first = np.unique(block[order], return_index=True)
    cheapest = np.full((num_blocks, num_blocks), np.inf)
    cheapest[present] = np.minimum.reduceat(extra, first, axis=0)
    price, before = _prices(cheapest)
    if before is None:
        return None
    last = np.append(first[1:], num_devices)
    movers = [
        first[place] + extra[first[place] : last[place], target].argmin()
        for target, source in enumerate(before)
        for place in np.flatnonzero(present == source)
    ]
    reduced = extra + (price[block[order], np.newaxis] - price)
    reduced[np.arange(num_devices), block[order]] = np.inf
    near = np.argsort(reduced.min(axis=1), kind="stable")[:_AT_ONCE]
    some: IntArray = order[np.union1d(near, movers)]
    return some


def _first_blocks(table: Float64Array, demand: IntArray) -> IntArray:
    """Begin: those to whom blocks make the least difference have the dearest ones."""
    num_devices, num_blocks = len(table), demand.size
    slots = int(demand.sum())
    cost = table[:, :-1]
    taking = np.argsort(cost.min(axis=1), kind="stable")[:slots]
    columns = np.argsort(-np.median(cost[taking], axis=0), kind="stable")
    difference = cost[taking, columns[0]] - cost[taking, columns[-1]]
    block = np.full(num_devices, num_blocks)
    block[taking[np.argsort(difference, kind="stable")]] = np.repeat(
        columns, demand[columns]
    )
    return block


def _prices(cheapest: Float64Array) -> tuple[Float64Array, IntArray | None]:
    """Cost of the cheapest way to each block from any, by Bellman and Ford's method.

    Returns
    -------
    The costs, and None; or, where there is a circle of less than no cost, what they are
    on the way to it, and for each block the one before it, -1 if none.
    """
    size = len(cheapest)
    price = np.zeros(size)
    before = np.full(size, -1)
    everywhere = np.arange(size)
    for _ in range(size):
        ways = price[:, np.newaxis] + cheapest
        source = ways.argmin(axis=0)
        cheaper = ways[source, everywhere]
        less = cheaper < price - _ROUNDING * np.abs(price)
        if not less.any():
            return price, None
        price = np.where(less, cheaper, price)
        before = np.where(less, source, before)
    return price, before
