"""The split of the band that takes least energy, for a given matching and deadline.

A device that sends over a share ``rho`` of the band sends for ``tau / rho``, so a
larger share takes less of its battery. By the deadline it needs at least the share
``least``; what is left of the band goes to those who save most with it.
"""

from __future__ import annotations

import numpy as np

from lola_flwr.allocation.band import least_share
from lola_flwr.arrays import Float64Array

# Where the deadline is the shortest round's, its shares just fit, but for rounding.
WHOLE_BAND = 1.0 + 1e-12


def least_sum_shares(
    full_band_j: Float64Array, least: Float64Array
) -> tuple[Float64Array, float]:
    """Split the band so that sending takes least energy in all.

    Parameters
    ----------
    full_band_j
        Energy of each device's upload over the whole band, joules, shape (A,).
    least
        Share that each one needs at least, shape (A,); their sum is at most 1.

    Returns
    -------
    The shares, shape (A,), and the price of the band at which each device would take
    its own: joules that a little more band would save, per share.

    Notes
    -----
    The least of ``sum a / rho`` with ``rho >= least`` and ``sum rho <= 1`` is where
    ``rho = max(least, sqrt(a / price))`` and the shares sum to 1 (the conditions of
    Karush, Kuhn and Tucker; the problem is convex). Devices are held at their least
    share one after the other until none of the others is below its own.
    """
    root = np.sqrt(full_band_j)
    free = root > 0.0
    while free.any():
        # Of the band, each free device has its root times this.
        scale = (1.0 - float(least[~free].sum())) / float(root[free].sum())
        below = free & (scale * root < least)
        if not below.any():
            return np.where(free, scale * root, least), scale**-2
        free &= ~below
    sending = root > 0.0
    prices = full_band_j[sending] / least[sending] ** 2
    return least.copy(), float(prices.max(initial=0.0))


def worst_shares(
    compute_j: Float64Array,
    transmit_w: Float64Array,
    full_band_upload_s: Float64Array,
    time_s: Float64Array,
    level_j: float,
    snr: Float64Array | None = None,
) -> Float64Array:
    """Least shares with which each device ends in time and within a level of energy.

    Parameters
    ----------
    compute_j, transmit_w, full_band_upload_s
        Energy of the computation, power while it sends, and upload time over the whole
        band, any shape.
    time_s
        Time left for the upload, same shape.
    level_j
        What each one may take, joules.
    snr
        As for `least_share`.

    Returns
    -------
    Same shape; infinite where no share will do.
    """
    left_j = level_j - compute_j
    with np.errstate(divide="ignore", invalid="ignore"):
        affordable_s = np.where(transmit_w > 0.0, left_j / transmit_w, np.inf)
    allowed_s = np.minimum(time_s, affordable_s)
    fits = (time_s >= 0.0) & (left_j >= 0.0) & (full_band_upload_s <= allowed_s)
    share = least_share(full_band_upload_s, np.maximum(allowed_s, 0.0), snr)
    # Without anything to send there is no share, however little time is left.
    share = np.where(full_band_upload_s == 0.0, 0.0, share)
    return np.where(fits, share, np.inf)


def least_level(
    compute_j: Float64Array,
    transmit_w: Float64Array,
    full_band_upload_s: Float64Array,
    time_s: Float64Array,
    snr: Float64Array | None = None,
) -> float:
    """Least energy within which all of these devices can end in time, joules.

    Parameters
    ----------
    compute_j, transmit_w, full_band_upload_s, time_s, snr
        As for `worst_shares`, shape (A,).

    Returns
    -------
    The least level at which the shares of `worst_shares` sum to at most 1; infinite
    where they never do.
    """
    from scipy.optimize import brentq

    def surplus(level_j: float) -> float:
        share = worst_shares(
            compute_j, transmit_w, full_band_upload_s, time_s, level_j, snr
        )
        return min(float(share.sum()), 1e9) - WHOLE_BAND

    # Over the whole band each; and with the shares that the deadline alone asks for.
    lower = float((compute_j + transmit_w * full_band_upload_s).max())
    if surplus(lower) <= 0.0:
        return lower
    if surplus(np.inf) > 0.0:
        return np.inf
    # More than the deadline allows to be spent, also after rounding.
    longest_s = np.maximum(time_s, full_band_upload_s)
    upper = float((compute_j + transmit_w * longest_s).max()) * (1.0 + 1e-9)
    real = np.finfo(np.float64)
    level_j = float(
        brentq(surplus, lower, upper, xtol=real.tiny, rtol=4 * real.eps, maxiter=1000)
    )
    while surplus(level_j) > 0.0:
        level_j = min(level_j * (1.0 + 4 * real.eps), upper)
    return level_j
