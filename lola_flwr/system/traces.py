"""Recorded throughput of devices' links, as CSV.

A file has a line for each change of a rate, in any order::

    time_s,device,mbit_s
    0,phone-1,8.5
    0,phone-2,3
    10,phone-1,2.25

A device has a rate from its time on until the next; the first one's also before it.
Its last one holds as long as the one before; then its trace begins anew, from 0 on. A
rate of 0 is an outage.
"""

from __future__ import annotations

import csv
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lola_flwr.errors import UserError, brief

_COLUMNS = ("time_s", "device", "mbit_s")


@dataclass(frozen=True)
class Traces:
    """Rates of devices' links by time.

    Parameters
    ----------
    samples
        Of each device, by its name: times, rising, and the rates from each on, bit/s.
    """

    samples: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]]

    @classmethod
    def read(cls, path: Path) -> Traces:
        """Read a file of traces.

        Raises
        ------
        UserError
            The file cannot be read, or a line is none of a trace; the message names it.
        """
        found: dict[str, dict[float, float]] = {}
        try:
            with path.open(encoding="utf-8", newline="") as file:
                for line, time_s, device, rate_bps in _lines(file, path):
                    times = found.setdefault(device, {})
                    if time_s in times:
                        raise UserError(
                            f"{path}, line {line}: {device!r} has two rates at "
                            f"{time_s:g} s."
                        )
                    times[time_s] = rate_bps
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            reason = getattr(error, "strerror", None) or "not a CSV file"
            raise UserError(f"The trace {path} cannot be read: {reason}.") from None
        if not found:
            raise UserError(f"{path} has no rates; write {','.join(_COLUMNS)}.")
        return cls(
            {
                name: (tuple(sorted(rates)), tuple(rates[t] for t in sorted(rates)))
                for name, rates in found.items()
            }
        )

    @property
    def devices(self) -> Sequence[str]:
        """Names of the devices."""
        return sorted(self.samples)

    def rate_bps(self, device: str, time_s: float) -> float:
        """Return a link's rate at some time.

        Raises
        ------
        KeyError
            There is no such device.
        """
        times, rates_bps = self.samples[device]
        if len(times) > 1:
            time_s = math.fmod(time_s, 2 * times[-1] - times[-2])
        return rates_bps[max(bisect_right(times, time_s) - 1, 0)]


def _lines(file: Iterator[str], path: Path) -> Iterator[tuple[int, float, str, float]]:
    """Give number, time, device and rate of each line of a file."""
    reader = csv.reader(file)
    header = [name.strip() for name in next(reader, [])]
    if sorted(header) != sorted(_COLUMNS):
        raise UserError(
            f"{path} begins with {brief(','.join(header))}; its first line must be "
            f"{','.join(_COLUMNS)}."
        )
    place = {name: header.index(name) for name in _COLUMNS}
    for row in reader:
        if not row:
            continue
        where = f"{path}, line {reader.line_num}"
        if len(row) != len(_COLUMNS):
            raise UserError(f"{where} has {len(row)} values instead of 3.")
        time_s, device, mbit_s = (row[place[name]].strip() for name in _COLUMNS)
        try:
            time, rate = float(time_s), 1e6 * float(mbit_s)
        except ValueError:
            time = rate = math.nan
        if not (0 <= time < math.inf and 0 <= rate <= 1e12) or not device:
            raise UserError(
                f"{where}: {brief(','.join(row))} must be seconds, a device's name, "
                "and a rate from 0 to 1e6 Mbit/s."
            )
        yield reader.line_num, time, device, rate
