"""Correct what devices claim by what they are observed to do.

Profiles and the analytic cost model are beliefs. Every accepted update carries the
compute time that the device needed, and the ratio of that to the predicted time is
explained by two factors: one per device (it is slower than its profile says, or got
slower) and one per block, common to all devices (the depth curve is steeper than the
cost model says). Both are tracked on a logarithmic scale.

The rate of a device's uplink is a belief, too, and its uploads correct it in the same
way, by one factor per device. How long a device takes to have its message, nobody
claims: it is as it was lately.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median_low

import numpy as np
import numpy.typing as npt

from lola_flwr.arrays import BoolArray, Float64Array

# Weight of a new observation: a device that gets four times slower is believed to be
# 2.5 times slower after one round, and 3.4 times after two.
_DEVICE_WEIGHT = 2 / 3
# The depth curve belongs to the model, not to a moment: it moves slowly, so that a
# device that stays on one block is not mistaken for a property of that block.
_BLOCK_WEIGHT = 0.03
# An upload that a limit held back shows no more than the limit, less what the transport
# itself costs: headers of a few percent, handshakes, and up to two seconds in which
# Flower does not look whether the last bytes are there.
_HEADERS = 1.08
_PAUSES_S = 2.0
# How much of a believed slow-down is taken back after an upload that ran at its limit.
_RECOVERY = 1.05
# No observation may move a prediction further than this factor: a device that reports
# nonsense can make itself unattractive, but cannot break the arithmetic.
_LARGEST_FACTOR = 1e3
# Of so many messages the one in the middle counts: the first one loads a program.
_LATEST_DOWNLINKS = 5


@dataclass(frozen=True)
class Observation:
    """One device's compute time on one block, seconds, as claimed and as observed."""

    device: str
    block_index: int
    claimed_s: float
    observed_s: float


@dataclass(frozen=True)
class ComputeEstimate:
    """Running correction of predicted compute times.

    Parameters
    ----------
    device_log_factor
        Logarithm of each observed device's factor, by device name.
    block_log_factor
        Logarithm of each observed block's factor, by block index.
    """

    device_log_factor: Mapping[str, float] = field(default_factory=dict)
    block_log_factor: Mapping[int, float] = field(default_factory=dict)

    def correct(
        self, claimed_s: Float64Array, devices: Sequence[str]
    ) -> npt.NDArray[np.float64]:
        """Return corrected compute times.

        Parameters
        ----------
        claimed_s
            Compute times that follow from profiles and cost model, seconds, shape
            [K, N].
        devices
            Names of the K devices.
        """
        unseen = self._of_unseen()
        by_device = np.array([self.device_log_factor.get(d, unseen) for d in devices])
        num_blocks = claimed_s.shape[1]
        by_block = np.array(
            [self.block_log_factor.get(n, 0.0) for n in range(num_blocks)]
        )
        return np.asarray(claimed_s * np.exp(by_device[:, None] + by_block[None, :]))

    def update(self, observations: Sequence[Observation]) -> ComputeEstimate:
        """Return the estimate after one round's observations."""
        if not observations:
            return self
        by_device = dict(self.device_log_factor)
        by_block = dict(self.block_log_factor)
        limit = np.log(_LARGEST_FACTOR)
        unseen = self._of_unseen()
        residuals = []
        for seen in observations:
            ratio = max(seen.observed_s, 0.0) / seen.claimed_s
            log_ratio = float(np.clip(np.log(max(ratio, 1e-300)), -limit, limit))
            known = by_device.get(seen.device, unseen)
            known += by_block.get(seen.block_index, 0.0)
            residuals.append(log_ratio - known)
        # What all devices of the round have in common is no property of one block: a
        # batch shorter than the cost model assumes speeds all of them up.
        common = float(np.median(residuals))
        for seen, residual in zip(observations, residuals, strict=True):
            old_block = by_block.get(seen.block_index, 0.0)
            by_block[seen.block_index] = old_block + _BLOCK_WEIGHT * (residual - common)
            old_device = by_device.get(seen.device, unseen)
            by_device[seen.device] = float(
                np.clip(old_device + _DEVICE_WEIGHT * residual, -limit, limit)
            )
        return replace(self, device_log_factor=by_device, block_log_factor=by_block)

    def _of_unseen(self) -> float:
        """Return what is believed of a device that was not seen yet: as of the others.

        What all have in common, such as texts shorter than the cost model assumes, is
        no property of those that were seen, by which they would be taken for faster.
        One alone may be slow itself.
        """
        known = self.device_log_factor.values()
        return median_low(known) if len(known) > 1 else 0.0


@dataclass(frozen=True)
class RateObservation:
    """One upload.

    Parameters
    ----------
    device
        Name of the device.
    claimed_bps
        Rate of its whole uplink, as its profile states it, bit/s.
    payload_bits
        What it sent.
    upload_s
        How long that took, on the server's clock.
    share
        Its share of the uplink.
    held
        Whether something held the upload to its share.
    """

    device: str
    claimed_bps: float
    payload_bits: float
    upload_s: float
    share: float
    held: bool


@dataclass(frozen=True)
class RateEstimate:
    """Running correction of the rates that profiles state.

    Parameters
    ----------
    device_log_factor
        Logarithm of each observed device's factor, by device name.
    """

    device_log_factor: Mapping[str, float] = field(default_factory=dict)

    def correct(
        self, claimed_bps: Float64Array, devices: Sequence[str]
    ) -> npt.NDArray[np.float64]:
        """Return corrected rates, bit/s, shape [K].

        Parameters
        ----------
        claimed_bps
            Rates that the profiles state, bit/s, shape [K].
        devices
            Names of the K devices.
        """
        factors = [self.device_log_factor.get(device, 0.0) for device in devices]
        return np.asarray(claimed_bps * np.exp(factors))

    def update(self, observations: Sequence[RateObservation]) -> RateEstimate:
        """Return the estimate after one round's observations."""
        by_device = dict(self.device_log_factor)
        limit = float(np.log(_LARGEST_FACTOR))
        common_s = self._common_delay_s(observations)
        for seen in observations:
            known = by_device.get(seen.device, 0.0)
            upload_s = max(seen.upload_s - common_s * seen.held, 1e-9)
            rate_bps = seen.payload_bits / upload_s / seen.share
            ratio = max(rate_bps / seen.claimed_bps, 1e-300)
            log_ratio = float(np.clip(np.log(ratio), -limit, limit))
            in_time_s = _HEADERS * self._limited_s(seen) + _PAUSES_S
            if seen.held and upload_s <= in_time_s:
                # At its limit: the link may carry more, but how much more remains
                # unseen. Believe the profile again, step by step, and no more than it.
                known = max(known, min(known + float(np.log(_RECOVERY)), 0.0))
            else:
                known += _DEVICE_WEIGHT * (log_ratio - known)
            by_device[seen.device] = known
        return RateEstimate(by_device)

    def _limited_s(self, seen: RateObservation) -> float:
        """Return how long an upload takes at its limit."""
        believed = np.exp(self.device_log_factor.get(seen.device, 0.0))
        return float(seen.payload_bits / (seen.share * seen.claimed_bps * believed))

    def _common_delay_s(self, observations: Sequence[RateObservation]) -> float:
        """Return by how much the limited uploads of a round were late, median.

        What they have in common is no property of one link: the server was busy. Each
        limit would otherwise be lowered after it, and the next round be later still.
        Two of them have nothing in common that could be told from their links.
        """
        late_s = [o.upload_s - self._limited_s(o) for o in observations if o.held]
        return max(float(np.median(late_s)), 0.0) if len(late_s) > 2 else 0.0


@dataclass(frozen=True)
class DownlinkEstimate:
    """How long devices take until they have their message and begin to compute.

    Parameters
    ----------
    latest_s
        Seconds of the latest messages, by device name.
    """

    latest_s: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def of(self, devices: Sequence[str]) -> npt.NDArray[np.float64]:
        """Return the seconds to expect, shape [K]; 0 of a device not seen yet."""
        return np.array(
            [median_low(self.latest_s.get(device, (0.0,))) for device in devices]
        )

    def are_known(self, devices: Sequence[str]) -> BoolArray:
        """Tell which devices were seen, shape [K]."""
        return np.array([device in self.latest_s for device in devices], bool)

    def update(self, observed_s: Mapping[str, float]) -> DownlinkEstimate:
        """Return the estimate after one round, given the seconds that were observed."""
        latest_s = dict(self.latest_s)
        for device, seconds in observed_s.items():
            known = (*latest_s.get(device, ()), seconds)
            latest_s[device] = known[-_LATEST_DOWNLINKS:]
        return DownlinkEstimate(latest_s)
