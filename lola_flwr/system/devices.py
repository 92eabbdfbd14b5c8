"""Device profiles, and generated fleets for simulation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from lola_flwr.errors import UserError, brief
from lola_flwr.randomness import rng_for

# Bounds of what a profile may claim: from a microcontroller to far beyond any edge
# device, so that no claim can make the arithmetic overflow.
_BOUNDS = {
    "flops_per_s": (1e5, 1e16),
    "memory_bytes": (1e5, 1e13),
    "snr_db": (-60.0, 80.0),
    "uplink_bps": (1e3, 1e12),
    "num_examples": (1, 1e12),
    "batch_size": (1, 1e12),
    "compute_power_w": (0.0, 1e4),
    "transmit_power_w": (0.0, 1e4),
}

# What a device may leave unsaid.
_UNSAID = {
    "uplink_bps",
    "num_examples",
    "batch_size",
    "compute_power_w",
    "transmit_power_w",
}

# What is so of a device only if it says so: what it can do where its memory asks for
# it, and all that it can do.
_FLAGS = ("splits_batch", "streams_prefix", "recomputes_suffix", "trains_one_block")


class InvalidProfile(UserError):
    """A device's profile lacks a field or claims an impossible value."""


@dataclass(frozen=True)
class DeviceProfile:
    """What a device offers.

    Parameters
    ----------
    name
        Stable name of the device, 1 to 64 printable characters; orders the fleet and
        keys its random draws.
    flops_per_s
        Sustained training speed, floating-point operations per second.
    memory_bytes
        Memory that fine-tuning may use.
    snr_db
        Mean uplink SNR at the server over uniform power per sub-carrier, dB; without
        meaning where ``uplink_bps`` is known.
    uplink_bps
        Rate of the uplink when this device has all of it, bit/s, as measured; None: it
        follows from ``snr_db`` and the fading of the round.
    splits_batch
        Whether it computes in micro-batches where its memory asks for it.
    streams_prefix
        Whether it leaves the layers below its block on disk where its memory asks for
        it.
    recomputes_suffix
        Whether it runs the layers from its block on twice, rather than keep what they
        compute, where its memory asks for it.
    num_examples
        Examples that it holds, where it says so: it is asked for no more at a time.
    trains_one_block
        Whether all that it trains in a round is one block, by a whole step of
        back-propagation, as exported programs do: it is asked for nothing else.
    batch_size
        Examples that a step of it is made for, where it has one size alone, as exported
        programs do: fewer take it as long, and more it refuses.
    compute_power_w, transmit_power_w
        What the whole device draws while it computes, and while it sends, watts; None:
        it does not say, and nothing is claimed about its energy.

    Raises
    ------
    InvalidProfile
        A value is not a finite number inside the bounds of this module, or not a bool.
    """

    name: str
    flops_per_s: float
    memory_bytes: float
    snr_db: float = 0.0
    uplink_bps: float | None = None
    splits_batch: bool = False
    streams_prefix: bool = False
    recomputes_suffix: bool = False
    num_examples: int | None = None
    trains_one_block: bool = False
    batch_size: int | None = None
    compute_power_w: float | None = None
    transmit_power_w: float | None = None

    def __post_init__(self) -> None:
        # The name goes into logs: no line breaks, no control characters.
        if (
            not isinstance(self.name, str)
            or not 1 <= len(self.name) <= 64
            or not self.name.isprintable()
        ):
            raise InvalidProfile(
                f"name={brief(self.name)} must be a string of 1 to 64 printable "
                "characters."
            )
        for field, (low, high) in _BOUNDS.items():
            value = getattr(self, field)
            if field in _UNSAID and value is None:
                continue
            # NaN is within no bounds.
            if (
                isinstance(value, bool)
                or not isinstance(value, (int, float))
                or not low <= value <= high
            ):
                raise InvalidProfile(
                    f"{field}={brief(value)} of device {self.name!r} must be a "
                    f"number from {low:g} to {high:g}."
                )
        for field in _FLAGS:
            if not isinstance(getattr(self, field), bool):
                raise InvalidProfile(
                    f"{field}={brief(getattr(self, field))} of device "
                    f"{self.name!r} must be true or false."
                )

    def joules(
        self, compute_s: float, upload_s: float, compute_j: float | None = None
    ) -> float | None:
        """Return what computing and sending take; None where something is not known.

        Parameters
        ----------
        compute_s, upload_s
            How long it computes, and sends, seconds.
        compute_j
            What computing took, where that was measured.
        """
        if compute_j is None and self.compute_power_w is not None:
            compute_j = self.compute_power_w * compute_s
        if compute_j is None or self.transmit_power_w is None:
            return None
        return compute_j + self.transmit_power_w * upload_s

    def to_properties(self) -> dict[str, str | float]:
        """Return the profile as flat properties, without what is not known or so."""
        return {
            key.replace("_", "-"): value
            for key, value in asdict(self).items()
            if value is not None and value is not False
        }

    @classmethod
    def from_properties(cls, properties: Mapping[str, object]) -> DeviceProfile:
        """Read and check the properties that a device reported.

        Raises
        ------
        InvalidProfile
            A property is missing or out of bounds. Other properties are ignored.
        """
        keys = {field.replace("_", "-"): field for field in cls.__dataclass_fields__}
        # Either of them tells the rate of the link.
        link = {"snr-db", "uplink-bps"} & set(properties)
        optional = {"snr-db", "uplink-bps"} if link else {"uplink-bps"}
        optional |= {field.replace("_", "-") for field in (*_FLAGS, *_UNSAID)}
        missing = [k for k in keys if k not in properties and k not in optional]
        if missing:
            raise InvalidProfile(
                f"The profile lacks {', '.join(missing)}; it must report "
                f"{', '.join(keys)}."
            )
        # The types are checked in __post_init__.
        return cls(**{keys[k]: properties[k] for k in keys if k in properties})  # type: ignore[arg-type]


@dataclass(frozen=True)
class FleetRanges:
    """Ranges from which a heterogeneous fleet is drawn.

    The paper's simulation parameters are not public; these are our choice: from a
    single-board computer to a small accelerator.

    Parameters
    ----------
    flops_per_s
        Slowest and fastest device; drawn log-uniformly.
    memory_bytes
        Smallest and largest memory; drawn log-uniformly.
    snr_db
        Lowest and highest mean SNR, dB; drawn uniformly.
    compute_power_w
        What the slowest and the fastest device draw while they compute, watts; of
        others it is on a line through these, of logarithms. None: they do not say.
    transmit_power_w
        Least and most that a device draws while it sends, watts; drawn
        log-uniformly. None: they do not say.
    """

    flops_per_s: tuple[float, float] = (2e10, 4e11)
    memory_bytes: tuple[float, float] = (1e9, 8e9)
    snr_db: tuple[float, float] = (0.0, 20.0)
    compute_power_w: tuple[float, float] | None = None
    transmit_power_w: tuple[float, float] | None = None

    def with_powers(self) -> FleetRanges:
        """Return the same with what such devices draw by published figures.

        Computing, from the 5 W mode of a Jetson Nano to the 15 W mode of a Jetson Orin
        Nano, by their data sheets; sending over LTE, from 1.3 W for the radio alone to
        3.8 W at 5.6 Mbit/s (Huang et al., A Close Examination of Performance and Power
        Characteristics of 4G LTE Networks, MobiSys 2012, table 4: 1.288 W, and 0.438 W
        for each Mbit/s).
        """
        return replace(
            self, compute_power_w=(5.0, 15.0), transmit_power_w=(1.288, 3.76)
        )


def simulated_device(
    index: int, *, seed: int, ranges: FleetRanges | None = None
) -> DeviceProfile:
    """Draw the profile of one simulated device.

    Parameters
    ----------
    index
        Number of the device in its fleet, from 0.
    seed
        Seed of the fleet; device ``index`` is the same in a fleet of any size.
    ranges
        Where to draw from (default: ``FleetRanges()``).

    Returns
    -------
    DeviceProfile
        Named ``device-0000`` and so on, so that names sort as numbers.
    """
    ranges = FleetRanges() if ranges is None else ranges
    rng = rng_for(seed, "fleet", index)
    speed = rng.random()
    profile = DeviceProfile(
        name=f"device-{index:04d}",
        flops_per_s=_log_uniform(speed, ranges.flops_per_s),
        memory_bytes=_log_uniform(rng.random(), ranges.memory_bytes),
        snr_db=float(rng.uniform(*ranges.snr_db)),
    )
    compute_w, transmit_w = ranges.compute_power_w, ranges.transmit_power_w
    if compute_w is not None:
        profile = replace(profile, compute_power_w=_log_uniform(speed, compute_w))
    if transmit_w is not None:
        radio = rng_for(seed, "fleet radio", index).random()
        profile = replace(profile, transmit_power_w=_log_uniform(radio, transmit_w))
    return profile


def _log_uniform(unit: float, bounds: tuple[float, float]) -> float:
    low, high = bounds
    return float(low * (high / low) ** unit)
