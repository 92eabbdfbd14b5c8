"""The keys that say what devices' links carry, each way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated

from pydantic import AfterValidator, Field

from lola_flwr.run.config import RunConfig, keyword_arguments
from lola_flwr.system.channel import Channel, DownlinkChannel, DownlinkMode, Uplink
from lola_flwr.system.fading import Fading
from lola_flwr.system.mobility import mobility_of
from lola_flwr.system.own_channel import find_channel


def _known_channel(name: str) -> str:
    # A function is looked for, and a file read, where the app runs.
    if name and ":" not in name and not name.endswith(".csv"):
        find_channel(name)
    return name


def _known_mobility(text: str) -> str:
    mobility_of(keyword_arguments(text))
    return text


class ChannelKeys(RunConfig):
    """Keys of a simulated channel, without those that all methods know."""

    uplink: Uplink = "ofdma"
    channel: Annotated[str, AfterValidator(_known_channel)] = ""
    fading: Fading = "rayleigh"
    coherence_s: float = Field(1.0, gt=0, allow_inf_nan=False)
    mobility: Annotated[str, AfterValidator(_known_mobility)] = ""
    downlink_channel: DownlinkMode = "free"
    downlink_bandwidth_hz: float = Field(20e6, gt=0, allow_inf_nan=False)
    downlink_gain_db: float = Field(10.0, ge=-60, le=80)

    def shared_channel(self, bandwidth_hz: float) -> Channel:
        """Return what the devices share, with an uplink of some bandwidth."""
        return Channel(
            bandwidth_hz=bandwidth_hz,
            uplink=self.uplink,
            fading=self.fading,
            coherence_s=self.coherence_s,
            mobility=mobility_of(keyword_arguments(self.mobility)),
            downlink_channel=DownlinkChannel(
                mode=self.downlink_channel,
                bandwidth_hz=self.downlink_bandwidth_hz,
                gain_db=self.downlink_gain_db,
            ),
            own_rates=find_channel(self.channel),
        )

    def _rates_twice(self, rates: Mapping[str, str]) -> Iterator[str]:
        """Say which keys contradict each other about what links carry.

        Parameters
        ----------
        rates
            Other keys that say so, by their names; "": they do not.
        """
        given = [
            f"{key}={value!r}"
            for key, value in {"channel": self.channel, **rates}.items()
            if value
        ]
        if len(given) > 1:
            both = " and ".join(given)
            yield f"{both} both say what links carry; drop one of the two"
        for key in ("uplink", "fading", "mobility"):
            value = getattr(self, key)
            # Devices may take turns on links whose rate they are told.
            told = value == "tdma" and self.channel
            if given and value != type(self).model_fields[key].default and not told:
                yield (
                    f"{key}={value!r} is for links whose rate follows from their SNR, "
                    f"and {given[0]} says what they carry; drop one of the two"
                )
