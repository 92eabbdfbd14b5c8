"""More devices than blocks: let the idle ones share blocks, at a bounded latency.

With the best shares all active devices end together and the whole band is in use, so
every further device takes band from the others. Within a deadline that is a little
later, some of the band is free, and devices may join a block: its gradient is then the
mean over the data of several.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lola_flwr.allocation.band import least_share
from lola_flwr.allocation.problem import AllocationProblem
from lola_flwr.allocation.shares import with_best_shares
from lola_flwr.allocation.solution import Allocation
from lola_flwr.arrays import Float64Array, IntArray


def share_blocks(
    problem: AllocationProblem, best: Allocation, *, longest_s: float
) -> tuple[AllocationProblem, Allocation]:
    """Let idle devices join blocks, as long as the round ends by a deadline.

    Parameters
    ----------
    problem
        The instance.
    best
        An allocation of it, usually the exact optimum.
    longest_s
        How long the round may take, seconds.

    Returns
    -------
    The problem in which blocks need as many devices as they have now, and the
    allocation, whose round_s is at most ``longest_s``; both those given where nobody
    can join. Deterministic.

    Notes
    -----
    In turns, so that no block has its third device before each that can have its second
    within what is left of the band has it. In a turn the idle devices that need least
    band in sum are matched to the blocks, one each, and join in this order.
    """
    devices = np.flatnonzero(best.block_of_device >= 0)
    blocks = best.block_of_device[devices]
    share = _least_shares(problem, longest_s)  # [K, N]
    left = 1.0 - float(share[devices, blocks].sum())
    trained = np.unique(blocks)
    idle = np.flatnonzero(best.block_of_device < 0)
    while idle.size:
        joining, joined = _next_turn(share[np.ix_(idle, trained)], left)
        if not joining.size:
            break
        devices = np.concatenate([devices, idle[joining]])
        blocks = np.concatenate([blocks, trained[joined]])
        left -= float(share[idle[joining], trained[joined]].sum())
        idle = np.delete(idle, joining)
    if devices.size == np.count_nonzero(best.block_of_device >= 0):
        return problem, best
    held = np.bincount(blocks, minlength=problem.num_blocks)
    mode = replace(problem.mode, blocks=None, devices_per_block=held.tolist())
    problem = replace(problem, mode=replace(mode, backups=0))
    shared = with_best_shares(
        problem,
        devices,
        blocks,
        bound_s=best.bound_s,
        iterations=best.iterations,
        stop_reason="sharing",
    )
    return problem, shared


def _next_turn(share: Float64Array, left: float) -> tuple[IntArray, IntArray]:
    """Return which rows join which columns, one each, within what is left."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(share)
    needed = share[rows, columns]
    order = np.argsort(needed, kind="stable")
    # At the cap of 1 a device needs the whole band, or has no time at all.
    fits = (np.cumsum(needed[order]) <= left) & (needed[order] < 1.0)
    if not fits.any():
        # The cheapest of all pairs need not be one of these. (More than the whole band
        # is never left.)
        cheapest = np.flatnonzero(share.ravel() == share.min())[:1]
        rows, columns = np.unravel_index(cheapest, share.shape)
        order = np.flatnonzero(share[rows, columns] < left)
        return rows[order], columns[order]
    return rows[order][fits], columns[order][fits]


def _least_shares(problem: AllocationProblem, longest_s: float) -> Float64Array:
    """Return the least share of each pair, at most 1, and 1 where it is impossible."""
    time_s = longest_s - problem.constant_s - problem.compute_s
    upload_s = np.where(problem.feasible, problem.full_band_upload_s, 0.0)
    snr = problem.snr_of(slice(None))
    share = least_share(upload_s, time_s, None if snr is None else snr[:, np.newaxis])
    return np.where(problem.feasible, share, 1.0)
