"""How long an upload takes at a share of the band, and the least share for a deadline.

Two ways in which a device may spread its transmit power:

- uniform power per sub-carrier (OFDMA, the default; ``snr is None`` below): the SNR
  does not depend on the share ``rho``, so an upload that takes ``tau`` over the whole
  band takes ``tau / rho``;
- a power-limited device puts all of its power on the part of the band that it has, so
  its SNR grows as its band narrows, and the upload takes
  ``tau * log(1 + snr) / (rho * log(1 + snr / rho))``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from lola_flwr.arrays import Float64Array

# Newton's iteration for the power-limited share starts close to the root and takes a
# handful of steps. The limit is there to end the loop whatever happens.
_MAX_NEWTON_STEPS = 60


@dataclass(frozen=True, eq=False)
class PowerLimitedUplink:
    """Devices that put their whole power on the part of the band that they are given.

    Parameters
    ----------
    snr
        Receive SNR of each device over the whole band, linear, shape (K,).

    Raises
    ------
    ValueError
        If a value is negative, NaN or infinite.
    """

    snr: Float64Array

    def __post_init__(self) -> None:
        """Check and freeze the SNRs."""
        snr = np.array(self.snr, dtype=np.float64)
        if snr.ndim != 1:
            raise ValueError(
                f"Shape mismatch: snr must be (K,), one value a device, but is "
                f"{snr.shape}."
            )
        bad = np.flatnonzero(~(np.isfinite(snr) & (snr >= 0.0)))
        if bad.size:
            raise ValueError(
                f"SNR must be finite and not negative: snr[{bad[0]}]={snr[bad[0]]}. "
                "Give a linear value, not dB."
            )
        snr.setflags(write=False)
        object.__setattr__(self, "snr", snr)


def upload_s(
    full_band_upload_s: Float64Array, share: ArrayLike, snr: Float64Array | None = None
) -> Float64Array:
    """Upload time at a share of the band.

    Parameters
    ----------
    full_band_upload_s
        Upload time over the whole band (tau), seconds, any shape.
    share
        Share of the band (rho), broadcastable to it; 0 means no upload ever ends.
    snr
        Linear SNR over the whole band for power-limited devices, broadcastable; None
        for uniform power per sub-carrier.

    Returns
    -------
    Seconds, 0 where nothing has to be sent, infinite where the share is 0.
    """
    share = np.asarray(share, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        relative_rate = share
        if snr is not None:
            relative_rate = share * np.log1p(snr / share) / np.log1p(snr)
        seconds = full_band_upload_s / relative_rate
    # 0 / 0 and inf * 0 are NaN above: nothing to send, and no band to send it in.
    seconds = np.where(share > 0.0, seconds, np.inf)
    return np.where(full_band_upload_s == 0.0, 0.0, seconds)


def least_share(
    full_band_upload_s: Float64Array,
    time_s: Float64Array,
    snr: Float64Array | None = None,
) -> Float64Array:
    """Least share of the band that ends an upload within a time, capped at 1.

    The cap is harmless and keeps every later sum finite: a round needs its shares to
    sum to at most 1, so an edge that needs the whole band or more can never be part of
    a round that beats the one whose deadline is asked about.

    Parameters
    ----------
    full_band_upload_s
        Upload time over the whole band (tau), seconds, any shape.
    time_s
        Time left for the upload, same shape; zero or negative means none.
    snr
        As in `upload_s`.

    Returns
    -------
    Share between 0 and 1; 1 wherever the whole band is needed or is not enough.

    Notes
    -----
    With power-limited devices the share is ``rho = snr / x``, x the positive root of
    ``log(1 + x) = a * x`` with ``a = tau / time * log(1 + snr) / snr < 1``, which is
    ``x = -W_{-1}(-a * exp(-a)) / a - 1`` in terms of Lambert's function. Near its
    branch point (low SNR) that formula loses half of the digits, so x is found by
    Newton's method instead: ``log(1 + x) - a * x`` is concave, hence from any point
    right of the root the iteration falls monotonically to it. Such a point is
    ``(1 + sqrt(2 u) + u) / a - 1`` with ``u = a - 1 - log(a)``, by the bound on W_{-1}
    of Chatzigeorgiou, IEEE Communications Letters 17(8), 2013.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        needed = full_band_upload_s / time_s
    needed = np.where(time_s > 0.0, np.minimum(needed, 1.0), 1.0)
    if snr is None:
        return needed
    return _power_limited_share(needed, np.broadcast_to(snr, needed.shape))


def _power_limited_share(
    relative_rate: Float64Array, snr: Float64Array
) -> Float64Array:
    """Share at which the rate is `relative_rate` of the full-band rate (any shape)."""
    share = relative_rate.copy()  # right at 0 and at 1, the ends of the range
    inside = (relative_rate > 0.0) & (relative_rate < 1.0) & (snr > 0.0)
    rate, snr = relative_rate[inside], snr[inside]
    slope = np.maximum(rate * (np.log1p(snr) / snr), np.finfo(np.float64).tiny)
    u = np.maximum(slope - 1.0 - np.log(slope), 0.0)
    x = np.maximum((np.sqrt(2.0 * u) + u + (1.0 - slope)) / slope, snr)
    for _ in range(_MAX_NEWTON_STEPS):
        with np.errstate(divide="ignore", invalid="ignore"):
            step = (np.log1p(x) - slope * x) / (1.0 / (1.0 + x) - slope)
        # A rate below 1 has a share below 1, that is x > snr; the bound also absorbs
        # the rounding that is left where both numerator and denominator vanish.
        nearer = np.maximum(x - np.nan_to_num(step, posinf=0.0, neginf=0.0), snr)
        if np.all(nearer >= x * (1.0 - 1e-15)):
            break
        x = np.minimum(nearer, x)
    share[inside] = snr / x
    return share
