"""What this machine draws, where it has sensors that tell: NVIDIA's Jetsons.

Their power monitors (INA3221 of Texas Instruments) show voltage and current of some
supplies under ``/sys``, by Linux's driver for it. Which of them are the whole module
depends on the board; of boards that are not known here nothing is claimed.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from lola_flwr.machine.sampling import Sampler

if TYPE_CHECKING:
    # A worker may live in Python 3.10, whose typing lacks it.
    from typing import Self

_DRIVERS = Path("/sys/bus/i2c/drivers")

# Supplies that are together all that a module draws, by their labels. Others on the
# same board are parts of these, or feed what is around the module.
_WHOLE_MODULES = (
    ("VDD_IN",),  # Orin Nano, Orin NX, Xavier NX
    ("POM_5V_IN",),  # Nano
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),  # AGX Orin
    ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"),  # AGX Xavier
)

_SAMPLE_INTERVAL_S = 0.05


@dataclass(frozen=True)
class Supply:
    """One supply that a power monitor measures.

    Parameters
    ----------
    label
        What the board calls it.
    millivolts, milliamperes
        Files that hold its voltage and its current.
    """

    label: str
    millivolts: Path
    milliamperes: Path

    def watts(self) -> float:
        """Read what it delivers now.

        Raises
        ------
        OSError, ValueError
            The monitor does not tell.
        """
        volts = float(self.millivolts.read_text(encoding="ascii")) / 1e3
        return volts * float(self.milliamperes.read_text(encoding="ascii")) / 1e3


def module_supplies(drivers: Path = _DRIVERS) -> tuple[Supply, ...]:
    """Return the supplies of the whole module; none where that is not known.

    Parameters
    ----------
    drivers
        Where Linux shows the drivers of its I2C buses.
    """
    found: dict[str, list[Supply]] = {}
    for file in sorted(drivers.glob("ina3221*/*/hwmon/hwmon*/in*_label")):
        number = file.name.removeprefix("in").removesuffix("_label")
        try:
            label = file.read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            continue
        supply = Supply(
            label,
            file.with_name(f"in{number}_input"),
            file.with_name(f"curr{number}_input"),
        )
        if supply.millivolts.exists() and supply.milliamperes.exists():
            found.setdefault(label, []).append(supply)
    for labels in _WHOLE_MODULES:
        # Of two with one label it is not known which is meant.
        if all(len(found.get(label, ())) == 1 for label in labels):
            return tuple(found[label][0] for label in labels)
    return ()


@cache
def _own_supplies() -> tuple[Supply, ...]:
    return module_supplies()


class measured_energy:
    """Measure what the machine draws during a ``with``, where it has sensors.

    All that runs on it then counts, and what it draws at rest.

    Parameters
    ----------
    supplies
        What is read (default: this machine's).

    Attributes
    ----------
    joules, mean_w
        The energy, and the mean power; after the ``with``. None where no sensor tells,
        or one fell silent.
    """

    def __init__(self, supplies: Sequence[Supply] | None = None) -> None:
        self._supplies = _own_supplies() if supplies is None else supplies
        self._samples: list[tuple[float, float]] = []
        self._sampler: Sampler | None = None
        self.joules: float | None = None
        self.mean_w: float | None = None

    def __enter__(self) -> Self:
        if self._supplies:
            self._sampler = Sampler(self._sample, _SAMPLE_INTERVAL_S)
            self._sampler.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._sampler is not None:
            self._sampler.stop()
        if samples := self._samples:
            self.joules = energy_j(samples)
            seconds = samples[-1][0] - samples[0][0]
            self.mean_w = self.joules / seconds if seconds > 0 else samples[0][1]

    def _sample(self) -> bool:
        """Take a sample; what was there before is of no use once one falls silent."""
        try:
            power_w = sum(supply.watts() for supply in self._supplies)
        except (OSError, ValueError):
            self._samples.clear()
            return False
        self._samples.append((time.perf_counter(), power_w))
        return True


def energy_j(samples: Iterable[tuple[float, float]]) -> float:
    """Return the energy between the first and the last of some samples, joules.

    Parameters
    ----------
    samples
        Time and power of each, seconds and watts; between them it is on a line.
    """
    return sum(
        (end_s - start_s) * (start_w + end_w) / 2
        for (start_s, start_w), (end_s, end_w) in pairwise(samples)
    )
