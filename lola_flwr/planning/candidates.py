"""Whom a round had better not ask for what, and what is left when that is too many.

The problem that profiles state is narrowed by what is known besides: who rests after
failures, who ran out of memory, whose channel or processor could not finish a block in
any useful time. A round that this would make impossible takes resting devices back, and
at last leaves blocks out.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lola_flwr.allocation import AllocationProblem, RoundMode
from lola_flwr.allocation.infeasible import is_feasible
from lola_flwr.allocation.matching import slots_of
from lola_flwr.arrays import BoolArray, Float64Array, IntArray

# Updates of a block, the latest ones, of which a device is to give but a part.
WINDOW = 20
# It is asked more often than others where it gave so many times its even part of all.
_ASKED_MORE = 1.1


def spared(
    problem: AllocationProblem,
    *,
    longest_s: float,
    required_bytes: Float64Array,
    memory_limit_bytes: Float64Array,
    wait_s: Float64Array | None = None,
) -> BoolArray:
    """Tell which pairs of device and block had better not be asked, shape [K, N].

    Parameters
    ----------
    problem
        The round's problem by profiles and channel; K devices, N blocks.
    longest_s
        A device that could not finish a block within this, had it the whole band to
        itself, is not asked for it: whoever claims the worst channel would get nearly
        all of the band.
    required_bytes
        Memory that each device takes for each block, shape [K, N].
    memory_limit_bytes
        Below how much memory each device's blocks must stay, shape [K]; infinite for
        devices without failures, 0 for those that rest altogether.
    wait_s
        How long each device would wait before it could begin, shape [K] (default: not
        at all).
    """
    latency_s = problem.compute_s + problem.full_band_upload_s
    if wait_s is not None:
        latency_s = latency_s + wait_s[:, None]
    late = latency_s > longest_s
    return np.asarray(late | (required_bytes >= memory_limit_bytes[:, None]))


def beyond_part(given: IntArray, able: BoolArray, most: float) -> BoolArray:
    """Tell which devices have given their part of a block's latest updates, [K, N].

    A device that is asked no more often than others is never meant.

    Parameters
    ----------
    given
        How many of each block's latest ``WINDOW`` updates each device gave, [K, N].
    able
        Which device can be asked for which block, shape [K, N].
    most
        How many times its even part, among the devices that can be asked, a device may
        give of a block; infinite: any number.
    """
    num_able = np.maximum(able.sum(axis=0), 1)  # [N]
    largest = np.maximum(np.floor(most * WINDOW / num_able), 1)
    even = given.sum() / max(able.any(axis=1).sum(), 1)
    asked_more = given.sum(axis=1) >= _ASKED_MORE * even  # [K]
    return np.asarray((given >= largest) & asked_more[:, None])


def lifted(
    memory_limit_bytes: Float64Array, failures: Sequence[int], count: int
) -> Float64Array:
    """Return limits without those of the ``count`` limited devices that failed least.

    Parameters
    ----------
    memory_limit_bytes
        As for `spared`.
    failures
        How often each device failed, [K].
    count
        How many devices are to be taken back.
    """
    limit = memory_limit_bytes.copy()
    limited = np.flatnonzero(np.isfinite(limit))
    order = np.argsort(np.asarray(failures)[limited], kind="stable")
    limit[limited[order[:count]]] = np.inf
    return limit


def narrowed(
    problem: AllocationProblem,
    *,
    longest_s: float,
    required_bytes: Float64Array,
    memory_limit_bytes: Float64Array,
    failures: Sequence[int],
    block_updates: Sequence[int] | IntArray,
    partial: bool,
    wait_s: Float64Array | None = None,
) -> tuple[IntArray, AllocationProblem]:
    """Return the problem without what had better not be asked.

    Parameters
    ----------
    problem, longest_s, required_bytes, memory_limit_bytes, wait_s
        As for `spared`.
    failures
        As for `lifted`: those that failed least are taken back first.
    block_updates
        Updates that each block has had, [N]: those with most are left out first.
    partial
        Whether blocks may be left out though already the profiles leave no choice.

    Returns
    -------
    The rows of ``problem`` that are left, rising, and the problem for these. (Rows
    are dropped only where every device has to take part.) If nothing helps this is
    ``problem`` itself, which `allocate` then explains.
    """

    def with_back(count: int) -> tuple[IntArray, AllocationProblem]:
        unasked = spared(
            problem,
            longest_s=longest_s,
            required_bytes=required_bytes,
            memory_limit_bytes=lifted(memory_limit_bytes, failures, count),
            wait_s=wait_s,
        )
        return _only(problem, problem.feasible & ~unasked)

    count = bisect_left(
        range(int(np.isfinite(memory_limit_bytes).sum())),
        True,
        key=lambda count: is_feasible(with_back(count)[1]),
    )
    rows, chosen = with_back(count)
    if is_feasible(chosen):
        return rows, chosen
    if partial or is_feasible(problem):
        covered = _covered(chosen, block_updates)
        if covered.any():
            mode = RoundMode(
                devices_per_block=covered.tolist(),
                participation=problem.mode.participation,
            )
            return rows, replace(chosen, mode=mode)
    return np.arange(problem.num_devices), problem


def _only(
    problem: AllocationProblem, feasible: BoolArray
) -> tuple[IntArray, AllocationProblem]:
    """Return the problem with fewer feasible pairs; see `narrowed` for the rows."""
    rows: IntArray = np.arange(problem.num_devices)
    able = np.flatnonzero(feasible.any(axis=1))
    if problem.all_devices and 0 < able.size < rows.size:
        rows = able
    power, names = problem.power_limited, problem.device_names
    memory_bytes, energy = problem.memory_bytes, problem.energy
    return rows, replace(
        problem,
        compute_s=problem.compute_s[rows],
        full_band_upload_s=problem.full_band_upload_s[rows],
        feasible=feasible[rows],
        memory_bytes=None if memory_bytes is None else memory_bytes[rows],
        device_names=None if names is None else [names[int(row)] for row in rows],
        power_limited=None if power is None else replace(power, snr=power.snr[rows]),
        energy=None if energy is None else energy.of_rows(rows),
    )


def _covered(
    problem: AllocationProblem, block_updates: Sequence[int] | IntArray
) -> IntArray:
    """Return how many devices each block can have, [N], where not all have enough.

    Of the largest matchings one that leaves out the blocks with most updates: an
    assignment of the greatest weight, where a block weighs more the fewer it has had.
    """
    from scipy.optimize import linear_sum_assignment

    slots = slots_of(problem.demand)
    updates = np.asarray(block_updates, np.float64)
    weight = 1.0 + updates.max(initial=0.0) - updates  # [N]
    gain = (problem.feasible * weight)[:, slots]
    rows, columns = linear_sum_assignment(gain, maximize=True)
    filled = slots[columns[gain[rows, columns] > 0]]
    return np.bincount(filled, minlength=problem.num_blocks)
