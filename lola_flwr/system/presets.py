"""Devices that people own, by published figures, and fleets of them.

``presets.toml`` beside this file holds the figures and their sources. Wherever a fleet
file is taken, so is a fleet like ``jetson-orin-nano:4,raspberry-pi-5:8``.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from lola_flwr.errors import UserError, brief, nearest
from lola_flwr.system.devices import DeviceProfile

if sys.version_info >= (3, 11):  # noqa: UP036
    import tomllib
else:  # the worker of a device whose system has Python 3.10
    import tomli as tomllib

_GIB = 2**30
_COUNT = re.compile("[1-9][0-9]{0,5}")


@dataclass(frozen=True)
class Preset:
    """A device by what is published of it, and by what is assumed.

    Parameters
    ----------
    name
        What it is called in a fleet.
    what
        Which product it is, and what of it computes.
    peak_flops_per_s
        Most floating-point operations of 32 bits a second, by its datasheet.
    flops_per_s
        What training is assumed to sustain of them.
    installed_bytes
        Memory that it is sold with.
    memory_bytes
        What fine-tuning is assumed to have of it.
    uplink_bps
        Rate of its link, bit/s.
    speed_source, memory_source, uplink_source
        Where the figures are published.
    compute_power_w
        What it draws while it computes, watts; None where nothing is published of the
        whole device. Of sending nothing is: that is for whoever measures.
    power_source
        Where that is published; may be empty.
    note
        What else to know; may be empty.
    """

    name: str
    what: str
    peak_flops_per_s: float
    flops_per_s: float
    installed_bytes: float
    memory_bytes: float
    uplink_bps: float
    speed_source: str
    memory_source: str
    uplink_source: str
    compute_power_w: float | None = None
    power_source: str = ""
    note: str = ""

    def device(self, name: str) -> DeviceProfile:
        """Return the profile of one such device."""
        return DeviceProfile(
            name=name,
            flops_per_s=self.flops_per_s,
            memory_bytes=self.memory_bytes,
            uplink_bps=self.uplink_bps,
            compute_power_w=self.compute_power_w,
        )


@cache
def presets() -> Mapping[str, Preset]:
    """Return all presets by their names."""
    text = (files("lola_flwr.system") / "presets.toml").read_text(encoding="utf-8")
    document = tomllib.loads(text)
    return {
        name: _preset(name, table, document["assumed"])
        for name, table in document["device"].items()
    }


def names_presets(where: str | Path) -> bool:
    """Tell whether presets are meant, rather than the path of a fleet file.

    A file of that name comes first; elsewhere what is no path and holds ``:`` or ``,``
    is a list of presets, for a mistake in it to be answered as such.
    """
    text = str(where)
    if text.endswith(".toml") or os.sep in text or Path(text).exists():
        return False
    return text in presets() or ":" in text or "," in text


def preset_fleet(text: str) -> tuple[DeviceProfile, ...]:
    """Return the fleet of ``NAME:COUNT,NAME:COUNT``; a name alone is one device.

    Raises
    ------
    UserError
        A preset is unknown or named twice, or a count is no number of at least 1.
    """
    counts: dict[str, int] = {}
    for part in text.split(","):
        name, colon, count = (word.strip() for word in part.partition(":"))
        if name not in presets():
            raise UserError(
                f"{brief(name)} in the fleet {brief(text)} is none of the presets "
                f"{', '.join(presets())}.{nearest(name, presets())}"
            )
        if colon and not _COUNT.fullmatch(count):
            raise UserError(
                f"{brief(part.strip())} in the fleet {brief(text)}: how many there are "
                f"must be a number from 1 to 999999, as in {name}:4."
            )
        if name in counts:
            raise UserError(f"The fleet {brief(text)} has {name} twice; write it once.")
        counts[name] = int(count) if colon else 1
    return tuple(
        # Numbers of one length sort as numbers.
        presets()[name].device(f"{name}-{number:0{len(str(count))}d}")
        for name, count in counts.items()
        for number in range(1, count + 1)
    )


def _preset(
    name: str, table: Mapping[str, Any], assumed: Mapping[str, float]
) -> Preset:
    peak = sum(
        core["number"] * core["clock-hz"] * core["operations"]
        for core in table["cores"]
    )
    installed = table["memory-gib"] * _GIB
    return Preset(
        name=name,
        what=table["what"],
        peak_flops_per_s=peak,
        flops_per_s=assumed["of-peak"] * peak,
        installed_bytes=installed,
        memory_bytes=assumed["of-memory"] * installed,
        uplink_bps=table["uplink-bps"],
        speed_source=table["speed-source"],
        memory_source=table["memory-source"],
        uplink_source=table["uplink-source"],
        compute_power_w=table.get("compute-power-w"),
        power_source=table.get("power-source", ""),
        note=table.get("note", ""),
    )
