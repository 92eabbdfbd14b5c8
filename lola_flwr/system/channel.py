"""Uplink of one cell: Rayleigh block fading and OFDMA rates.

Notation: K devices, bandwidth in Hz, ``snr`` linear (``snr_db`` only at the border).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lola_flwr.arrays import Float64Array
from lola_flwr.randomness import rng_for

if TYPE_CHECKING:
    from lola_flwr.system.devices import DeviceProfile


@dataclass(frozen=True, kw_only=True)
class Channel:
    """What a run's devices share.

    Parameters
    ----------
    bandwidth_hz
        Total uplink bandwidth.
    fading
        Whether the channel fades (Rayleigh), or every device has its mean SNR.
    broadcast_s, server_s
        Constant parts of every round: downlink and server time.
    """

    bandwidth_hz: float = 20e6
    fading: bool = True
    broadcast_s: float = 0.0
    server_s: float = 0.0

    @property
    def constant_s(self) -> float:
        """Constant part of every round, seconds."""
        return self.broadcast_s + self.server_s


def db_to_linear(value_db: npt.ArrayLike) -> Float64Array:
    """Convert decibels to a ratio."""
    return np.asarray(10.0 ** (np.asarray(value_db, dtype=np.float64) / 10.0))


def rayleigh_snr(
    transmit_snr_db: Sequence[float] | Float64Array,
    device_names: Sequence[str],
    *,
    server_round: int,
    seed: int,
) -> Float64Array:
    """Draw each device's receive SNR for one round.

    Block fading: the power gain ``|h|^2 ~ Exp(1)`` holds for one round and is drawn
    anew for the next (arXiv:2407.09873, system model).

    Parameters
    ----------
    transmit_snr_db
        Mean receive SNR of each device, dB, shape [K].
    device_names
        Names of the K devices. A device's draw depends on its name, the round and the
        seed alone, not on which other devices are there.
    server_round
        Round, from 1.
    seed
        Seed of the run.

    Returns
    -------
    Receive SNR, linear, shape [K].
    """
    gain = [
        rng_for(seed, "fading", server_round, name).exponential()
        for name in device_names
    ]
    return np.asarray(db_to_linear(transmit_snr_db) * np.asarray(gain))


def full_band_rate_bps(bandwidth_hz: float, snr: Float64Array) -> Float64Array:
    """Shannon rate of each device when it has the whole band, bit/s, shape [K].

    With OFDMA and uniform power per sub-carrier the SNR does not depend on the share of
    the band, so a share rho carries rho times this rate.
    """
    # log1p keeps the rate of a device in a deep fade (snr near 0) above zero.
    return np.asarray(bandwidth_hz * np.log1p(snr) / np.log(2.0))


def uplink_rates_bps(
    profiles: Sequence[DeviceProfile],
    *,
    bandwidth_hz: float,
    server_round: int,
    seed: int,
    fading: bool = True,
) -> Float64Array:
    """Return each device's rate when it has the whole uplink, bit/s, shape [K].

    A device whose profile states the rate of its link has that rate; for the others it
    follows from their SNR and the fading of the round.

    Parameters
    ----------
    profiles
        The K devices.
    bandwidth_hz, server_round, seed
        As for ``full_band_rate_bps`` and ``rayleigh_snr``.
    fading
        Whether the channel fades, or every device has its mean SNR.
    """
    snr_db = [profile.snr_db for profile in profiles]
    snr = (
        rayleigh_snr(
            snr_db,
            [profile.name for profile in profiles],
            server_round=server_round,
            seed=seed,
        )
        if fading
        else db_to_linear(snr_db)
    )
    stated = [
        math.nan if profile.uplink_bps is None else profile.uplink_bps
        for profile in profiles
    ]
    drawn = full_band_rate_bps(bandwidth_hz, snr)
    return np.where(np.isnan(stated), drawn, stated)
