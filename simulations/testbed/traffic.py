"""See when a device's upload begins and ends, from outside: on the server's interfaces.

    python traffic.py INTERVAL_S INTERFACE...

prints, until it is stopped, one line of the time and of the bytes that each interface
has received. It runs inside the server's namespace, and knows nothing of Flower.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# Below this rate a link carries heartbeats and questions for work, but no upload.
_IDLE_BYTES = 20_000
# A busy device pauses in the middle of an upload, and a quick one soon begins another:
# the longest of these silences that tells as many uploads apart as there were.
_GAPS_S = (4.0, 2.0, 1.0, 0.5)


@dataclass(frozen=True)
class Burst:
    """One upload as the wire shows it.

    Parameters
    ----------
    start_s, end_s
        When it began and ended, Unix time.
    received_bytes
        Bytes of Ethernet frames in it.
    """

    start_s: float
    end_s: float
    received_bytes: int


def bursts(
    times_s: Sequence[float],
    received_bytes: Sequence[int],
    *,
    smallest_bytes: float,
    fewest: int = 1,
) -> list[Burst]:
    """Find uploads in a counter's samples.

    Parameters
    ----------
    times_s, received_bytes
        Samples of the counter.
    smallest_bytes
        A burst of fewer bytes is none.
    fewest
        How many there were at least.
    """
    for gap_s in _GAPS_S:
        found = [
            _trimmed(times_s, received_bytes, first, last)
            for first, last in _active(times_s, received_bytes, gap_s)
            if received_bytes[last] - received_bytes[first] >= smallest_bytes
        ]
        if len(found) >= fewest:
            break
    return found


def _active(
    times_s: Sequence[float], received_bytes: Sequence[int], gap_s: float
) -> list[tuple[int, int]]:
    """Return the first and last sample of each stretch without so long a silence."""
    found = []
    start = last = None
    for index in range(1, len(times_s)):
        # Over half a second back, so that one late packet does not look like silence.
        before = index
        while before > 0 and times_s[index] - times_s[before] < 0.5:
            before -= 1
        if received_bytes[index] - received_bytes[before] > _IDLE_BYTES:
            start = before if start is None else start
            last = index
        elif (
            start is not None
            and last is not None
            and times_s[index] - times_s[last] > gap_s
        ):
            found.append((start, last))
            start = last = None
    if start is not None and last is not None:
        found.append((start, last))
    return found


def _trimmed(
    times_s: Sequence[float], received_bytes: Sequence[int], first: int, last: int
) -> Burst:
    """Cut the quiet ends of a burst off: less than half a percent of its bytes each."""
    total = received_bytes[last] - received_bytes[first]
    while received_bytes[first + 1] - received_bytes[first] < 0.001 * total / 2:
        first += 1
    while received_bytes[last] - received_bytes[last - 1] < 0.001 * total / 2:
        last -= 1
    return Burst(times_s[first], times_s[last], total)


def _main(interval_s: float, interfaces: Sequence[str]) -> None:
    counters = [Path(f"/sys/class/net/{i}/statistics/rx_bytes") for i in interfaces]
    while True:
        values = [counter.read_text().strip() for counter in counters]
        print(f"{time.time():.3f}", *values, flush=True)
        time.sleep(interval_s)


if __name__ == "__main__":
    _main(float(sys.argv[1]), sys.argv[2:])
