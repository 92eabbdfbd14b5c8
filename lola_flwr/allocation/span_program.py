"""Covers of a round's blocks by spans, as programs that HiGHS solves.

A cover is a path over the blocks: a span leads from the block where it begins to the
one behind its last, and what is left out leads one block on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lola_flwr.arrays import Float64Array, IntArray
from lola_flwr.machine.output import stdout_without

if TYPE_CHECKING:
    from scipy.sparse import csr_array

# What milp says.
_OPTIMAL, _INFEASIBLE = 0, 2


def least_band(cost: Float64Array) -> float:
    """Bound what all blocks cost with all devices, by a linear program.

    It is that of the prices' highest bound; capped at 1, by what costs as much alone.
    """
    from scipy.optimize import LinearConstraint, milp

    num_devices, num_blocks = cost.shape[:2]
    device, first, last = np.nonzero(cost < 1.0)
    if not device.size:
        return 1.0
    path, ends = _path(first, last + 1, num_blocks)
    used = _used(device, (num_devices, device.size))
    found = milp(  # none of the numbers has to be whole
        cost[device, first, last],
        constraints=[LinearConstraint(path, ends, ends), LinearConstraint(used, 1, 1)],
    )
    if found.status == _OPTIMAL and found.fun is not None:
        return min(float(found.fun), 1.0)
    return 1.0 if found.status == _INFEASIBLE else 0.0


def cheapest_cover(
    cost: Float64Array, worth: Float64Array, time_limit_s: float
) -> tuple[list[tuple[int, int, int]], bool]:
    """Find the spans that are worth most, of most devices, and of those the cheapest.

    Parameters
    ----------
    cost
        Of each device and span, at most 1; infinite where impossible, [K, n, n].
    worth
        Of each block, whole numbers from 1 on, [n].
    time_limit_s
        When to stop, seconds.

    Returns
    -------
    Device, first and last block of each span, from the first block on (none where none
    was found in time), and whether it is certain that no others are better.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    num_devices, num_blocks = cost.shape[:2]
    device, first, last = np.nonzero(np.isfinite(cost))
    number, block = device.size + num_blocks, np.arange(num_blocks)
    path, ends = _path(
        np.concatenate([first, block]), np.concatenate([last, block]) + 1, num_blocks
    )
    used = _used(device, (num_devices, number))
    # No band is worth a device, and no devices a block.
    price = num_devices + 1.0
    paid = np.concatenate([cost[device, first, last] - price, worth * price**2])
    with stdout_without("HighsMipSolverData::"):
        found = milp(
            paid,
            integrality=np.ones(number),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(path, ends, ends),
                LinearConstraint(used, 0, 1),
            ],
            options={"mip_rel_gap": 0.0, "time_limit": time_limit_s},
        )
    if found.x is None:
        return [], False
    chosen = np.flatnonzero(found.x[: device.size] > 0.5)
    spans = zip(*(part[chosen].tolist() for part in (device, first, last)), strict=True)
    return sorted(spans, key=lambda span: span[1]), found.status == _OPTIMAL


def _path(
    start: IntArray, end: IntArray, num_blocks: int
) -> tuple[csr_array, Float64Array]:
    """Return what leaves each block less what comes there, and what it has to be."""
    from scipy.sparse import csr_array

    arcs, ones = np.arange(start.size), np.ones(start.size)
    nodes = (num_blocks + 1, start.size)
    leaving = csr_array((ones, (start, arcs)), shape=nodes)
    ends = np.zeros(num_blocks + 1)
    ends[[0, -1]] = 1.0, -1.0
    return leaving - csr_array((ones, (end, arcs)), shape=nodes), ends


def _used(device: IntArray, shape: tuple[int, int]) -> csr_array:
    """Return how many spans each device has, of the first arcs."""
    from scipy.sparse import csr_array

    return csr_array((np.ones(device.size), (device, np.arange(device.size))), shape)
