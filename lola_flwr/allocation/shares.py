"""The best split of the band for a given matching, and its latency.

For a matching in which device k computes for ``c`` and uploads for ``tau`` over the
whole band, the shares that end the round earliest let every device end at the same
time T, the root of ``sum tau / (T - c) = 1``: ``rho = tau / (T - c)``. Slow computers
get more bandwidth, the "bandwidth compensation" of Remark 1 in Wu, Chen, Huang,
arXiv:2407.09873. With power-limited devices the left side is the sum of the least
shares of `lola_flwr.allocation.band`, which falls with T too.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lola_flwr.allocation.band import least_share, upload_s
from lola_flwr.allocation.in_turn import round_in_turn_s
from lola_flwr.allocation.problem import AllocationProblem
from lola_flwr.allocation.solution import Allocation
from lola_flwr.arrays import Float64Array, IntArray

# Shares are scaled by this so that their sum never rounds to above 1, in whatever
# order somebody adds them: numpy's pairwise sum of any length errs by less than 64 ulp.
_ROUNDING_GUARD = 1.0 - 64 * np.finfo(np.float64).eps

_MAX_NEWTON_STEPS = 100


def best_deadline(
    compute_s: Float64Array,
    full_band_upload_s: Float64Array,
    snr: Float64Array | None = None,
) -> float:
    """Earliest time by which all of these devices can have finished, seconds.

    Parameters
    ----------
    compute_s, full_band_upload_s
        Computation and full-band upload time of each device, seconds, shape (A,).
    snr
        Full-band SNR of each device if power-limited, shape (A,).
    """
    latest = compute_s.max()
    sending = full_band_upload_s > 0.0
    if not sending.all():
        if not sending.any():
            return float(latest)
        compute_s, full_band_upload_s = compute_s[sending], full_band_upload_s[sending]
        snr = None if snr is None else snr[sending]
    last = compute_s.max()
    wait = _common_wait(last - compute_s, full_band_upload_s, snr)
    return float(max(latest, last + wait))


def best_shares(
    compute_s: Float64Array,
    full_band_upload_s: Float64Array,
    snr: Float64Array | None = None,
) -> Float64Array:
    """Split the band so that the last of these devices finishes as early as possible.

    Parameters
    ----------
    compute_s, full_band_upload_s
        Computation and full-band upload time of each device, seconds, shape (A,).
    snr
        Full-band SNR of each device if power-limited, shape (A,).

    Returns
    -------
    Share of each device, shape (A,); 0 for a device with nothing to send, and a sum of
    at most 1.
    """
    share = np.zeros_like(compute_s)
    sending = np.flatnonzero(full_band_upload_s > 0.0)
    if sending.size == 0:
        return share
    compute_s, full_band_upload_s = compute_s[sending], full_band_upload_s[sending]
    snr = None if snr is None else snr[sending]
    slack = compute_s.max() - compute_s
    wait = _common_wait(slack, full_band_upload_s, snr)
    needed = least_share(full_band_upload_s, slack + wait, snr)
    # Scaling down by more than rounding cannot happen: the wait is the root of sum = 1.
    share[sending] = needed * (_ROUNDING_GUARD / max(1.0, float(needed.sum())))
    return share


def _common_wait(
    slack_s: Float64Array, full_band_upload_s: Float64Array, snr: Float64Array | None
) -> float:
    """Time x from the last device's end of computing to the end of the round.

    Solves ``sum tau / (x + slack) = 1`` with ``slack = max(c) - c``. Working with x
    rather than with T keeps all digits when uploads are tiny beside the computation:
    nothing here is a difference of nearly equal numbers.
    """
    total = float(full_band_upload_s.sum())
    # Two lower bounds: nobody has more than the whole band, and (Jensen, as 1 / (x + s)
    # is convex in s) the same round with every slack at its upload-weighted mean.
    alone = float((full_band_upload_s - slack_s).max())
    if snr is not None:
        return _power_limited_wait(slack_s, full_band_upload_s, snr, total)
    mean_slack = float(full_band_upload_s @ (slack_s / total))
    # Newton on 1 / sum = 1. That function is a harmonic mean of lines, so it rises and
    # is concave: from the left the iteration rises monotonically to the root, and where
    # all slacks are equal it is a line and one step suffices.
    wait = max(alone, total - mean_slack)
    for _ in range(_MAX_NEWTON_STEPS):
        share = full_band_upload_s / (slack_s + wait)
        excess = float(share.sum())
        slope = float((share / (slack_s + wait)).sum())
        longer = wait + excess * (excess - 1.0) / slope
        if not longer > wait:
            break
        wait = longer
    return wait


def _power_limited_wait(
    slack_s: Float64Array,
    full_band_upload_s: Float64Array,
    snr: Float64Array,
    total: float,
) -> float:
    """As `_common_wait` for power-limited devices, by a bracketed root."""
    from scipy.optimize import brentq

    def surplus(wait: float) -> float:
        needed = least_share(full_band_upload_s, slack_s + wait, snr)
        return float(needed.sum()) - 1.0

    # Left: the slowest would need the whole band alone. Right: with uniform power every
    # share would do for `total`, and a narrow band is never slower when power-limited.
    lower = max(float((full_band_upload_s - slack_s).max()), 0.0)
    if surplus(lower) <= 0.0:
        return lower
    if surplus(total) >= 0.0:
        return total
    real = np.finfo(np.float64)
    wait = float(
        brentq(surplus, lower, total, xtol=real.tiny, rtol=4 * real.eps, maxiter=1000)
    )
    # End on the side where the shares fit: at low SNR a time that is short by rounding
    # needs far more band, which scaling the shares down would take from everybody.
    while surplus(wait) > 0.0:
        wait = min(wait * (1.0 + 4 * real.eps), total)
    return wait


def with_best_shares(
    problem: AllocationProblem, devices: IntArray, blocks: IntArray, **outcome: Any
) -> Allocation:
    """Allocation of a matching with the shares that end it earliest.

    Parameters
    ----------
    problem
        The instance that the matching belongs to.
    devices, blocks
        Active devices and the block of each, shape (A,).
    outcome
        Further fields of the `Allocation`: bound_s, iterations, stop_reason.
    """
    share = best_shares(*_matched_costs(problem, devices, blocks))
    return _allocation(problem, devices, blocks, share, outcome)


def with_shares(
    problem: AllocationProblem,
    devices: IntArray,
    blocks: IntArray,
    share: Float64Array,
    **outcome: Any,
) -> Allocation:
    """Allocation of a matching that gives the whole band out in given proportions.

    Parameters
    ----------
    problem, devices, blocks, outcome
        As for `with_best_shares`.
    share
        What the shares are in proportion to, shape (A,); 0 for a device with nothing to
        send.
    """
    total = float(share.sum())
    whole = share * (_ROUNDING_GUARD / total) if total else share
    return _allocation(problem, devices, blocks, whole, outcome)


def with_equal_shares(
    problem: AllocationProblem, devices: IntArray, blocks: IntArray, **outcome: Any
) -> Allocation:
    """Allocation of a matching that gives every active device the same share.

    Parameters are those of `with_best_shares`.
    """
    share = np.full(devices.size, _ROUNDING_GUARD / devices.size)
    return _allocation(problem, devices, blocks, share, outcome)


def _matched_costs(
    problem: AllocationProblem, devices: IntArray, blocks: IntArray
) -> tuple[Float64Array, Float64Array, Float64Array | None]:
    return (
        problem.compute_s[devices, blocks],
        problem.full_band_upload_s[devices, blocks],
        problem.snr_of(devices),
    )


def _allocation(
    problem: AllocationProblem,
    devices: IntArray,
    blocks: IntArray,
    share: Float64Array,
    outcome: dict[str, Any],
) -> Allocation:
    compute_s, full_band_upload_s, snr = _matched_costs(problem, devices, blocks)
    if problem.in_turn:
        last_s = round_in_turn_s(compute_s, full_band_upload_s)
        share = full_band_upload_s / last_s if last_s else np.zeros_like(compute_s)
    else:
        finish_s = compute_s + upload_s(full_band_upload_s, share, snr)
        last_s = float(finish_s.max())
    block_of_device = np.full(problem.num_devices, -1, dtype=np.int64)
    block_of_device[devices] = blocks
    share_of_device = np.zeros(problem.num_devices)
    share_of_device[devices] = share
    return Allocation(
        block_of_device=block_of_device,
        share=share_of_device,
        num_blocks=problem.num_blocks,
        round_s=problem.constant_s + last_s,
        **outcome,
    )
