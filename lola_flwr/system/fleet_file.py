"""Fleets of devices, as TOML files.

A fleet file names each device and what it offers::

    [[device]]
    name = "phone-7"
    flops-per-s = 2e11   # sustained training speed, floating-point operations a second
    memory-bytes = 4e9   # memory that fine-tuning may use
    snr-db = 12.0        # mean uplink SNR at the server over the whole band

The keys of a device are those of its profile; ``uplink-bps`` is the rate of a link that
is known, in place of the SNR, ``compute-power-w`` and ``transmit-power-w`` what the
device draws. In place of a file's path, ``jetson-orin-nano:4`` and the
like are devices by published figures (`lola_flwr.system.presets`).
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w

from lola_flwr.errors import UserError, nearest
from lola_flwr.machine.files import local_path
from lola_flwr.system.devices import (
    DeviceProfile,
    FleetRanges,
    InvalidProfile,
    simulated_device,
)
from lola_flwr.system.presets import names_presets, preset_fleet, presets

if sys.version_info >= (3, 11):  # noqa: UP036
    import tomllib
else:  # the worker of a device whose system has Python 3.10
    import tomli as tomllib

Fleet = tuple[DeviceProfile, ...]

_KEYS = tuple(field.replace("_", "-") for field in DeviceProfile.__dataclass_fields__)
_EXAMPLE = "lola-flwr fleet generate 6 --out fleet.toml"


def generate_fleet(
    num_devices: int, *, seed: int = 0, ranges: FleetRanges | None = None
) -> Fleet:
    """Draw a fleet, as a simulation with that seed has it.

    Parameters
    ----------
    num_devices
        Devices, at least 1.
    seed
        Seed of the fleet.
    ranges
        Where to draw from (default: ``FleetRanges()``).

    Raises
    ------
    UserError
        No devices are asked for.
    """
    if num_devices < 1:
        raise UserError(f"A fleet has at least 1 device, not {num_devices}.")
    return tuple(
        simulated_device(index, seed=seed, ranges=ranges)
        for index in range(num_devices)
    )


def read_fleet(where: str | Path) -> Fleet:
    """Read a fleet file, and check all of it; or make a fleet of presets.

    Parameters
    ----------
    where
        The file, or presets: ``jetson-orin-nano:4,raspberry-pi-5:8``.

    Raises
    ------
    UserError
        The file cannot be read, is no TOML, or a device is not described completely;
        the one-line message names the device and every fault of it. Or there is no
        such preset.
    """
    if names_presets(where):
        return preset_fleet(str(where))
    path = local_path(where)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError(
            f"The fleet file {path} cannot be read: {reason}; `{_EXAMPLE}` writes one."
            f"{nearest(str(where), presets())}"
        ) from None
    try:
        return parse_fleet(text)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def from_anywhere(where: Path) -> str:
    """Return what says the same of a fleet in every working directory."""
    return str(where) if names_presets(where) else str(where.absolute())


def parse_fleet(text: str) -> Fleet:
    """Read a fleet from the text of a fleet file; see `read_fleet`."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"This is no TOML: {error}.") from None
    _refuse_unknown(document, ("device",), "a fleet file", "[[device]] tables")
    tables = document.get("device", [])
    if not isinstance(tables, list) or not tables:
        raise UserError(
            "There is no device here; describe each in a [[device]] table with "
            f"{', '.join(_KEYS)}."
        )
    devices = tuple(_device(number, table) for number, table in enumerate(tables, 1))
    name, count = Counter(device.name for device in devices).most_common(1)[0]
    if count > 1:
        raise UserError(
            f"name={name!r} is that of {count} devices; give each a name of its own."
        )
    return devices


def fleet_toml(fleet: Sequence[DeviceProfile]) -> str:
    """Return the text of a fleet file."""
    tells_power = any(device.compute_power_w is not None for device in fleet)
    return (
        "# A fleet for lola-flwr. Of each device: training speed (floating-point\n"
        "# operations a second), memory that fine-tuning may use (bytes), and mean\n"
        "# uplink SNR over the whole band (dB).\n"
        + "# Power: what the whole device draws, in watts.\n" * tells_power
        + "\n"
    ) + tomli_w.dumps({"device": [device.to_properties() for device in fleet]})


def _device(number: int, table: Any) -> DeviceProfile:
    if not isinstance(table, dict):
        raise UserError(f"Device {number} is no table; start it with [[device]].")
    named = table.get("name")
    who = f"device {number}" + (f" ({named})" if isinstance(named, str) else "")
    _refuse_unknown(table, _KEYS, who, f"the keys {', '.join(_KEYS)}")
    try:
        return DeviceProfile.from_properties(table)
    except InvalidProfile as error:
        raise UserError(f"In {who}: {error}") from None


def _refuse_unknown(
    table: dict[str, Any], known: Sequence[str], where: str, what: str
) -> None:
    for key in table:
        if key not in known:
            raise UserError(
                f"Unknown key {key!r} in {where}, which has {what}."
                f"{nearest(key, known)}"
            )
