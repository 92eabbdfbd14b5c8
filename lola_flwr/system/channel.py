"""One cell, both ways: what devices' links carry in a round.

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
from lola_flwr.system.devices import InvalidProfile
from lola_flwr.system.fading import Fading, power_gain
from lola_flwr.system.mobility import Mobility
from lola_flwr.system.own_channel import Moment, RateFunction, own_rates_bps

if TYPE_CHECKING:
    from lola_flwr.system.devices import DeviceProfile


DownlinkMode = Literal["free", "broadcast", "unicast"]
Uplink = Literal["ofdma", "power-limited", "tdma"]


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
    uplink
        ``"ofdma"``: devices send with uniform power per sub-carrier, so that a share of
        the band carries that share of the rate. ``"power-limited"``: a device puts all
        of its power on its share, where its SNR is the higher the smaller that is.
        ``"tdma"``: devices send one after the other, each over the whole band.
    fading
        How links fade, see `lola_flwr.system.fading`.
    coherence_s
        Of ``"gauss-markov"`` fading.
    mobility
        How devices move (default: they do not).
    broadcast_s, server_s
        Constant parts of every round: a downlink whose time is known, and server time.
    downlink_channel
        How the model comes to the devices, where that is to be modelled.
    own_rates
        What links carry that no profile states the rate of, in place of fading and
        bandwidth: see `lola_flwr.system.own_channel`. Both ways alike.

    Raises
    ------
    UserError
        There is no such ``uplink`` or ``fading``, ``coherence_s`` is not positive, or
        ``own_rates`` are given beside what they take the place of.
    """

    bandwidth_hz: float = 20e6
    uplink: Uplink = "ofdma"
    fading: Fading = "rayleigh"
    coherence_s: float = 1.0
    mobility: Mobility | None = None
    broadcast_s: float = 0.0
    server_s: float = 0.0
    downlink_channel: DownlinkChannel = DownlinkChannel()
    own_rates: RateFunction | None = None

    def __post_init__(self) -> None:
        """Check now what would else be an error in round 1, or not be seen at all."""
        for name, kinds in (("uplink", Uplink), ("fading", Fading)):
            if getattr(self, name) not in get_args(kinds):
                raise UserError(
                    f"{name}={getattr(self, name)!r} must be one of "
                    f"{', '.join(get_args(kinds))}."
                )
        if not 0 < self.coherence_s < math.inf:
            raise UserError(f"coherence_s={self.coherence_s} must be positive.")
        if self.own_rates is None:
            return
        for name in ("uplink", "fading", "mobility"):
            if getattr(self, name) not in (getattr(Channel, name), "tdma"):
                raise UserError(
                    f"{name}={getattr(self, name)!r} is for links whose rate follows "
                    "from their SNR, and a channel of your own (own_rates) says what "
                    "links carry; drop one of the two."
                )

    @property
    def constant_s(self) -> float:
        """Constant part of every round, seconds."""
        return self.broadcast_s + self.server_s

    @property
    def depends_on_time(self) -> bool:
        """Whether a round's draw depends on the time that those before it took."""
        return (
            self.own_rates is not None
            or self.mobility is not None
            or self.fading == "gauss-markov"
        )

    def check_profile(self, profile: DeviceProfile) -> None:
        """Refuse a device whose link would not carry what is planned.

        Raises
        ------
        InvalidProfile
            It states the rate of its link: not how that rises as its share falls; and
            real links wait for no turn.
        """
        if self.uplink != "ofdma" and profile.uplink_bps is not None:
            why = (
                "what a share of the band carries follows from the SNR"
                if self.uplink == "power-limited"
                else "devices take turns, which nothing makes real links do"
            )
            raise InvalidProfile(
                f"uplink_bps={profile.uplink_bps:g} of device {profile.name!r}: under "
                f"uplink={self.uplink!r} {why}; state snr_db alone, or use "
                "uplink='ofdma'."
            )


def db_to_linear(value_db: npt.ArrayLike) -> Float64Array:
    """Convert decibels to a ratio."""
    return np.asarray(10.0 ** (np.asarray(value_db, dtype=np.float64) / 10.0))


def receive_snr(
    profiles: Sequence[DeviceProfile],
    channel: Channel,
    moment: Moment,
    *,
    gain_db: float = 0.0,
) -> Float64Array:
    """Return each device's SNR over the whole band in a round, linear, shape [K].

    Parameters
    ----------
    profiles
        The K devices.
    channel
        What they share.
    moment
        When the round begins.
    gain_db
        What is added to the devices' SNR, dB.
    """
    names = [profile.name for profile in profiles]
    snr_db = np.array([profile.snr_db + gain_db for profile in profiles])
    if channel.mobility is not None:
        snr_db = snr_db + channel.mobility.gain_db(names, moment)
    gain = power_gain(channel.fading, names, moment, coherence_s=channel.coherence_s)
    return np.asarray(db_to_linear(snr_db) * gain)


def full_band_rate_bps(bandwidth_hz: float, snr: Float64Array) -> Float64Array:
    """Shannon rate of each device when it has the whole band, bit/s, shape [K].

    With uniform power per sub-carrier the SNR does not depend on the share of the band,
    so a share rho carries rho times this rate.
    """
    # log1p keeps the rate of a device in a deep fade (snr near 0) above zero.
    return np.asarray(bandwidth_hz * np.log1p(snr) / np.log(2.0))


def full_band_snr(bandwidth_hz: float, rate_bps: Float64Array) -> Float64Array:
    """Return the SNR at which the whole band carries a rate, linear, shape [K]."""
    return np.asarray(np.expm1(rate_bps * np.log(2.0) / bandwidth_hz))


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
    snr = receive_snr(profiles, channel, moment, gain_db=gain_db)
    return _stated_or(full_band_rate_bps(bandwidth_hz, snr), profiles)
