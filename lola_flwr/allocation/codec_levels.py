"""Finer payloads where they cost the round little: the codec of each device.

A round is shortest if every device sends the coarsest payload: all share one band, and
any finer payload makes it longer. But a device with a fast uplink needs little of the
band for a payload twice as large. So the round is allocated for the coarsest payload,
and may then become longer by a given factor; within that deadline devices are given
finer payloads, those first that need least more of the band for it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from lola_flwr.allocation.band import least_share
from lola_flwr.allocation.problem import AllocationProblem
from lola_flwr.allocation.shares import with_best_shares
from lola_flwr.allocation.solution import Allocation
from lola_flwr.arrays import IntArray


def refine_payloads(
    problem: AllocationProblem,
    coarsest: Allocation,
    payload_bits: ArrayLike,
    *,
    slack: float,
    fixed: ArrayLike = False,
) -> tuple[AllocationProblem, Allocation, IntArray]:
    """Give devices finer payloads than the coarsest within a bound on the latency.

    Parameters
    ----------
    problem
        The instance, with the upload times of the coarsest payload.
    coarsest
        An allocation of it.
    payload_bits
        Bits of each block's payload at each level, coarsest first, shape (L, N).
    slack
        Relative latency that may be given up.
    fixed
        Whether a device's payload is not one of these and stays as it is, shape (K,).

    Returns
    -------
    The problem with the upload times of the payloads chosen; an allocation of it with
    the same matching and the best shares, whose round_s is at most
    ``(1 + slack) * coarsest.round_s``; and each device's level, shape (K,), 0 where
    idle. If no device gets a finer payload, problem and allocation are those given.

    Raises
    ------
    ValueError
        If the slack is negative.

    Notes
    -----
    Level by level, so that no device has its second refinement before each that can
    have its first within what is left of the band has it. Within a level the order by
    band needed gives most devices the finer payload.
    """
    if not slack >= 0.0:
        raise ValueError(f"slack must be at least 0, but is {slack}.")
    bits = np.asarray(payload_bits, dtype=np.float64)
    factor = bits / bits[0]  # [L, N]
    devices = np.flatnonzero(coarsest.block_of_device >= 0)
    blocks = coarsest.block_of_device[devices]
    upload_s = problem.full_band_upload_s[devices, blocks]
    time_s = (  # what is left for the upload
        (1.0 + slack) * coarsest.round_s
        - problem.constant_s
        - problem.compute_s[devices, blocks]
    )
    snr = problem.snr_of(devices)
    needed = least_share(upload_s, time_s, snr)
    level = np.zeros(problem.num_devices, dtype=np.int64)
    # Those that have the level before.
    candidates = np.flatnonzero(~np.broadcast_to(fixed, level.shape)[devices])
    for finer in range(1, len(bits)):
        share = least_share(upload_s * factor[finer, blocks], time_s, snr)
        # A share of 1 is a cap: the whole band may not be enough.
        candidates = candidates[share[candidates] < 1.0]
        more = share[candidates] - needed[candidates]
        order = np.argsort(more, kind="stable")
        fitting = needed.sum() + np.cumsum(more[order]) <= 1.0
        candidates = candidates[order][fitting]
        level[devices[candidates]] = finer
        needed[candidates] = share[candidates]
    if not level.any():
        return problem, coarsest, level
    problem = replace(
        problem, full_band_upload_s=problem.full_band_upload_s * factor[level]
    )
    refined = with_best_shares(
        problem,
        devices,
        blocks,
        bound_s=coarsest.bound_s,
        iterations=coarsest.iterations,
        stop_reason="payloads",
    )
    return problem, refined, level
