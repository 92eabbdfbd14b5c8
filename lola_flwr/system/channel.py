"""One cell, both ways: Rayleigh block fading and OFDMA rates.

Notation: K devices, bandwidth in Hz, ``snr`` linear (``snr_db`` only at the border).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import numpy.typing as npt

from lola_flwr.arrays import Float64Array
from lola_flwr.errors import UserError
from lola_flwr.randomness import rng_for
from lola_flwr.system.own_channel import Moment, RateFunction, own_rates_bps

if TYPE_CHECKING:
    from lola_flwr.system.devices import DeviceProfile


DownlinkMode = Literal["free", "broadcast", "unicast"]


@dataclass(frozen=True, kw_only=True)
class DownlinkChannel:
    """How the model comes to the devices.

    Parameters
    ----------
    mode
        ``"free"``: in no time. ``"broadcast"``: it is sent once, over the whole band,
        at the rate of the worst device that takes part; all begin then. ``"unicast"``:
        the band is divided evenly among as many devices as a round may have, and each
        begins when it has the model.
    bandwidth_hz
        Total downlink bandwidth.
    gain_db
        By how much the base station's transmit power exceeds a device's, dB: both ways
        fade alike, so a device receives with the SNR of its uplink and so much more.

    Raises
    ------
    UserError
        There is no such mode, or a number is not finite, or the bandwidth not positive.
    """

    mode: DownlinkMode = "free"
    bandwidth_hz: float = 20e6
    gain_db: float = 10.0

    def __post_init__(self) -> None:
        """Check now what would else be an error in round 1."""
        if self.mode not in get_args(DownlinkMode):
            raise UserError(
                f"mode={self.mode!r} of the downlink must be one of "
                f"{', '.join(get_args(DownlinkMode))}."
            )
        if not 0 < self.bandwidth_hz < math.inf or not math.isfinite(self.gain_db):
            raise UserError(
                f"bandwidth_hz={self.bandwidth_hz} of the downlink must be positive, "
                f"and gain_db={self.gain_db} finite."
            )


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
        Constant parts of every round: a downlink whose time is known, and server time.
    downlink_channel
        How the model comes to the devices, where that is to be modelled.
    own_rates
        What links carry that no profile states the rate of, in place of fading and
        bandwidth: see `lola_flwr.system.own_channel`. Both ways alike.
    """

    bandwidth_hz: float = 20e6
    fading: bool = True
    broadcast_s: float = 0.0
    server_s: float = 0.0
    downlink_channel: DownlinkChannel = DownlinkChannel()
    own_rates: RateFunction | None = None

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
    gain_db: float = 0.0,
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
    gain_db
        What is added to the devices' SNR, dB.
    """
    snr_db = [profile.snr_db + gain_db for profile in profiles]
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
    return _stated_or(full_band_rate_bps(bandwidth_hz, snr), profiles)


def _stated_or(
    rate_bps: Float64Array, profiles: Sequence[DeviceProfile]
) -> Float64Array:
    """Return the rates that profiles state, and others where they do not."""
    stated = [
        math.nan if profile.uplink_bps is None else profile.uplink_bps
        for profile in profiles
    ]
    return np.where(np.isnan(stated), rate_bps, stated)


def rates_up_bps(
    profiles: Sequence[DeviceProfile], channel: Channel, moment: Moment
) -> Float64Array:
    """Return each device's rate when it has the whole uplink, bit/s, shape [K].

    Parameters
    ----------
    profiles
        The K devices.
    channel
        What they share.
    moment
        When the round begins.

    Raises
    ------
    UserError
        A channel of one's own has no rate for a device.
    """
    if channel.own_rates is None:
        return _drawn(profiles, channel, moment, channel.bandwidth_hz, 0.0)
    own_bps = own_rates_bps(channel.own_rates, profiles, moment)
    return _stated_or(own_bps, profiles)


def rates_down_bps(
    profiles: Sequence[DeviceProfile], channel: Channel, moment: Moment
) -> Float64Array:
    """Return each device's rate when it has the whole downlink, bit/s, shape [K].

    A link whose rate is known up, by its profile or a channel of one's own, is as fast
    down. Of the others the round's fading is that of the uplink.

    Parameters
    ----------
    profiles, channel, moment
        As for `rates_up_bps`.
    """
    if channel.own_rates is not None:
        return rates_up_bps(profiles, channel, moment)
    down = channel.downlink_channel
    return _drawn(profiles, channel, moment, down.bandwidth_hz, down.gain_db)


def _drawn(
    profiles: Sequence[DeviceProfile],
    channel: Channel,
    moment: Moment,
    bandwidth_hz: float,
    gain_db: float,
) -> Float64Array:
    return uplink_rates_bps(
        profiles,
        bandwidth_hz=bandwidth_hz,
        server_round=moment.server_round,
        seed=moment.seed,
        fading=channel.fading,
        gain_db=gain_db,
    )
