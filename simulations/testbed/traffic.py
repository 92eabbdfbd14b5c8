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
# A busy device pauses in the middle of an upload; rounds are further apart than this.
_GAP_S = 4.0


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
    times_s: Sequence[float], received_bytes: Sequence[int], *, smallest_bytes: float
) -> list[Burst]:
    """Find uploads in a counter's samples.

    Parameters
    ----------
    times_s, received_bytes
        Samples of the counter.
    smallest_bytes
        A burst of fewer bytes is none.
    """
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
            and times_s[index] - times_s[last] > _GAP_S
        ):
            found.append((start, last))
            start = last = None
    if start is not None and last is not None:
        found.append((start, last))
    return [
        _trimmed(times_s, received_bytes, first, end)
        for first, end in found
        if received_bytes[end] - received_bytes[first] >= smallest_bytes
    ]


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
