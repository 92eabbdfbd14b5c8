"""Put what the server planned beside what the wire showed."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simulations.testbed.traffic import Burst, bursts


@dataclass(frozen=True)
class Upload:
    """One device's upload in one round.

    Parameters
    ----------
    server_round
        Round, from 1.
    device
        Its name.
    share
        Its share of the uplink.
    predicted_s
        How long the server expected the upload to take.
    wire_s
        From its first to its last byte on the link.
    server_s
        As the server measured it, from the reply's announcement to its last byte; None
        if it was not.
    ended_s
        When the last byte was there, Unix time.
    """

    server_round: int
    device: str
    share: float
    predicted_s: float
    wire_s: float
    server_s: float | None
    ended_s: float

    @property
    def error(self) -> float:
        """Relative error of the prediction, signed."""
        return self.predicted_s / self.wire_s - 1


@dataclass(frozen=True)
class Parts:
    """What a round's time goes to: the way of its last device, and the server's own.

    Parameters
    ----------
    downlink_s
        Until the device has its message and begins.
    compute_s
        Until it has trained.
    upload_s
        Until its update is with the server.
    server_s
        All else: the step, the plan, and the sending of messages.
    """

    downlink_s: float
    compute_s: float
    upload_s: float
    server_s: float


@dataclass(frozen=True)
class Outcome:
    """What one allocator came to with one kind of node.

    Parameters
    ----------
    allocator
        Their names.
    uploads
        All uploads.
    planned_s
        Latency of each round by the server's plan, and what it takes itself.
    wall_s
        Time from one round's last byte to the next one's; the first round, which loads
        the model, has none.
    parts
        What that went to, as the server measured it, where it did.
    """

    allocator: str
    uploads: Sequence[Upload]
    planned_s: Mapping[int, float]
    wall_s: Mapping[int, float]
    parts: Mapping[int, Parts]

    @property
    def median_round_error(self) -> float:
        """Median of how much shorter rounds were planned than they took, relative."""
        return statistics.median(
            self.planned_s[number] / wall_s - 1
            for number, wall_s in self.wall_s.items()
        )

    @property
    def median_error(self) -> float:
        """Median of the predictions' relative errors, without sign."""
        return statistics.median(abs(upload.error) for upload in self.uploads)

    @property
    def mean_wall_s(self) -> float:
        """Mean time of a round."""
        return statistics.mean(self.wall_s.values())


def read_samples(text: str) -> tuple[list[float], list[list[int]]]:
    """Return the times of a traffic log, and each interface's counter."""
    rows = [line.split() for line in text.splitlines() if line.strip()]
    width = max(map(len, rows), default=1)
    rows = [row for row in rows if len(row) == width]  # the last one may be cut off
    times = [float(row[0]) for row in rows]
    return times, [[int(row[1 + i]) for row in rows] for i in range(width - 1)]


def outcome(
    allocator: str,
    rounds: Path,
    samples: tuple[Sequence[float], Sequence[Sequence[int]]],
    payload_bytes: float,
) -> Outcome:
    """Match the uploads on the wire with the rounds of a run.

    Parameters
    ----------
    allocator
        Name of the allocator.
    rounds
        The run's ``rounds.jsonl``.
    samples
        Times, and the bytes that the server received from each device.
    payload_bytes
        What an upload has at least; less is none.

    Raises
    ------
    ValueError
        The wire shows fewer uploads of a device than the rounds do.
    """
    records = [json.loads(line) for line in rounds.read_text().splitlines()]
    times_s, received = samples
    accepted = Counter(
        _index(block["device"])
        for record in records
        for block in record["blocks"]
        if block["status"] == "accepted"
    )
    on_wire = {
        index: iter(
            bursts(
                times_s,
                counter,
                smallest_bytes=0.8 * payload_bytes,
                fewest=accepted[index],
            )
        )
        for index, counter in enumerate(received)
    }
    uploads = [upload for record in records for upload in _uploads(record, on_wire)]
    ends = {
        record["server_round"]: max(
            upload.ended_s
            for upload in uploads
            if upload.server_round == record["server_round"]
        )
        for record in records
    }
    wall_s = {n: end - ends[n - 1] for n, end in ends.items() if n - 1 in ends}
    parts = {
        record["server_round"]: found
        for record in records
        if (wall := wall_s.get(record["server_round"])) is not None
        and (found := _parts(record, wall)) is not None
    }
    return Outcome(
        allocator,
        uploads,
        {
            record["server_round"]: record["round_s"] + record.get("server_s", 0.0)
            for record in records
        },
        wall_s,
        parts,
    )


def _parts(record: Mapping[str, Any], wall_s: float) -> Parts | None:
    """Return what a round's time went to; None if the server did not measure it."""
    names = ("measured_downlink_s", "reported_compute_s", "measured_upload_s")
    ways = [
        times
        for block in record["blocks"]
        if None not in (times := [block.get(name) for name in names])
    ]
    if not ways:
        return None
    downlink_s, compute_s, upload_s = max(ways, key=sum)
    server_s = wall_s - downlink_s - compute_s - upload_s
    return Parts(downlink_s, compute_s, upload_s, server_s)


def _index(name: str) -> int:
    """Return the number of a simulated device: it is called device-0000, say."""
    return int(name.rpartition("-")[2])


def _uploads(
    record: Mapping[str, Any], on_wire: Mapping[int, Iterator[Burst]]
) -> Iterator[Upload]:
    for block in record["blocks"]:
        if block["status"] != "accepted":
            continue
        index = _index(block["device"])
        burst = next(on_wire[index], None)
        if burst is None:
            raise ValueError(
                f"The wire shows no upload of {block['device']} in round "
                f"{record['server_round']}."
            )
        yield Upload(
            record["server_round"],
            block["device"],
            block["share"],
            block["upload_s"],
            burst.end_s - burst.start_s,
            block["measured_upload_s"],
            burst.end_s,
        )
