"""Which blocks devices return together, so that enough of them return each block.

A window is some consecutive blocks, behind the last of which the first follows again.
Windows are all of one length and begin at even distances, so that each block is in
about as many of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from lola_flwr.allocation import AllocationProblem, RoundMode
from lola_flwr.arrays import BoolArray, Float64Array
from lola_flwr.planning.known import Known, RunStatement

Windows = Mapping[int, tuple[int, ...]]


def chosen_windows(
    run: RunStatement,
    known: Known,
    problem: AllocationProblem,
    *,
    memory_limit_bytes: Float64Array,
) -> tuple[Windows, RoundMode] | None:
    """Choose the windows of a round's devices, as short as they can be.

    They are shorter yet where that is too much for a device that can train one block.

    Parameters
    ----------
    run
        What the run's rounds have in common.
    known
        What is known before this one.
    problem
        The round's problem with one block a device.
    memory_limit_bytes
        As in `RoundProblem`.

    Returns
    -------
    The windows by their first blocks, and how many devices take each; None where
    nothing of that is asked for, or the mode says itself who trains what.
    """
    num_blocks, mode = run.num_blocks, problem.mode
    wanted = _returned_by(run, problem)
    if (
        wanted == 1
        or mode.blocks is not None
        or known.worth is not None
        or (num_blocks > 1 and run.costs.together is None)
    ):
        return None
    memory_bytes = np.array([p.memory_bytes for p in known.profiles])

    def able(windows: Windows) -> int:
        required_bytes = window_costs(run, known, windows)[1][:, [*windows]]
        fits = required_bytes <= memory_bytes[:, None]
        fits &= required_bytes < memory_limit_bytes[:, None]
        fits &= ~beyond_one(run, known, windows)[:, [*windows]]
        return int(fits.any(axis=1).sum())

    count = able({block: (block,) for block in range(num_blocks)})
    if not count:
        return None
    longest = min(num_blocks, math.ceil(wanted * num_blocks / count))
    for length in range(longest, 0, -1):
        windows = even_windows(num_blocks, length, count)
        if able(windows) == count:
            break
    if length < longest and count < num_blocks:
        # Too few for all blocks: who trains which is chosen by what they can hold.
        return None
    each = max(1, count // len(windows))
    return windows, RoundMode(
        blocks=tuple(windows), devices_per_block=each, participation="all"
    )


def _returned_by(run: RunStatement, problem: AllocationProblem) -> int:
    """Return how many devices windows let return each block; 1: there are none.

    A mode that asks for several a block has them by windows where they are too few for
    one block each.
    """
    mode = problem.mode
    each = mode.devices_per_block
    if each == 1:
        return run.allocation.returned_by
    if not isinstance(each, int) or mode.backups:
        return 1
    return each if problem.num_devices < each * run.num_blocks else 1


def even_windows(num_blocks: int, length: int, num_devices: int) -> Windows:
    """Return windows of a length at even distances, at most one a device."""
    if length == num_blocks:
        return {0: tuple(range(num_blocks))}
    number = min(num_blocks, num_devices)
    firsts = [n * num_blocks // number for n in range(number)]
    return {a: tuple((a + n) % num_blocks for n in range(length)) for a in firsts}


def window_costs(
    run: RunStatement, known: Known, windows: Windows
) -> tuple[Float64Array, Float64Array]:
    """Return each device's operations and memory, [K, N], at windows' first blocks.

    Back-propagation that ends in the first block has passed all: a window that begins
    again there costs what all blocks cost.
    """
    costs = run.costs.joined([w for w in windows.values() if w[-1] >= w[0]])
    flops = costs.required_flops(known.profiles)
    required_bytes = costs.required_bytes(known.profiles)
    again = [first for first, window in windows.items() if window[-1] < first]
    if again:
        whole = run.costs.joined([range(run.num_blocks)])
        flops[:, again] = whole.required_flops(known.profiles)[:, :1]
        required_bytes[:, again] = whole.required_bytes(known.profiles)[:, :1]
    return flops, required_bytes


def beyond_one(run: RunStatement, known: Known, windows: Windows) -> BoolArray:
    """Tell which devices train one block, and windows' first blocks lead to more.

    Shape [K, N].
    """
    several = np.zeros(run.num_blocks, bool)
    several[[first for first, window in windows.items() if len(window) > 1]] = True
    return known.one_block[:, None] & several
