"""What happened in a round: a record, as log lines and as a line of a JSON file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from lola_flwr.errors import UserError

_Record = TypeVar("_Record", "BlockRecord", "RoundRecord")


@dataclass(frozen=True)
class BlockRecord:
    """One device's part in a round; seconds as planned unless ``reported``.

    ``ignored_arrays`` counts what the device sent beyond its block and the head.
    ``measured_upload_s`` is on the server's clock, None where the transport does not
    tell; ``uplink_limit`` is what held the upload to its share, None if nothing did.
    ``payload_bytes`` is the message that the allocation counted on, ``received_bytes``
    the arrays in the one that came, ``sent_bytes`` the arrays sent to the device.
    Memory is what the block needs by the cost model, what the device offers, and at its
    peak what the device measured, None if it did not.
    """

    block_index: int
    depth: int
    device: str
    share: float
    compute_s: float
    upload_s: float
    reported_compute_s: float | None
    compute_clock: str
    loss: float | None
    status: str
    ignored_arrays: int = 0
    measured_upload_s: float | None = None
    uplink_limit: str | None = None
    codec: str = ""
    payload_bytes: int = 0
    received_bytes: int = 0
    sent_bytes: int = 0
    required_memory_bytes: float | None = None
    memory_bytes: float | None = None
    peak_memory_bytes: float | None = None

    @property
    def exceeds_memory(self) -> bool:
        """Whether the device took more memory than it offers: the cost model erred."""
        return (
            self.peak_memory_bytes is not None
            and self.memory_bytes is not None
            and self.peak_memory_bytes > self.memory_bytes
        )

    @property
    def latency_s(self) -> float:
        """Planned seconds from the assignment to the received gradient."""
        return self.compute_s + self.upload_s


@dataclass(frozen=True)
class RoundRecord:
    """One round.

    Parameters
    ----------
    server_round
        Round, from 1.
    num_devices
        Devices K that the round could choose from.
    wireless_s
        Sum of ``observed_s`` up to and with this round.
    num_excluded
        Devices that were left out where all others take part: they have not the memory
        for a block, or rest after failures.
    round_s
        Planned latency of the round.
    observed_s
        Latency with the compute times that devices reported, and the upload times that
        were measured, in place of the planned ones; equals ``round_s`` where there are
        none.
    bound_s
        Lower bound of the best possible latency; nan if the allocator gives none.
    train_loss
        Mean loss over the accepted updates' examples; None without any.
    refused
        Refused replies, counted by reason.
    blocks
        Each active device's part.
    skipped
        Why nobody was asked to take part; None if the round took place.
    measured_strategy_s
        Seconds that the server itself took to plan the round and to step the model.
    exchanges, sent_bytes, received_bytes, measured_s
        Where the model is spread over devices: messages that followed one upon the
        other, the bytes of the arrays in them, to and from all devices, and how long
        all of that took.
    metrics
        Evaluation of the model after this round, by metric; empty where none was made.
    """

    server_round: int
    num_devices: int
    wireless_s: float
    num_excluded: int = 0
    round_s: float = 0.0
    observed_s: float = 0.0
    bound_s: float = math.nan
    train_loss: float | None = None
    refused: Mapping[str, int] = field(default_factory=dict)
    blocks: tuple[BlockRecord, ...] = ()
    skipped: str | None = None
    measured_strategy_s: float = 0.0
    exchanges: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    measured_s: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """Return the record as log lines."""
        if self.skipped is not None:
            return [f"round {self.server_round} is skipped: {self.skipped}"]
        if self.exchanges:
            return [self._spread_line()]
        bound = "" if math.isnan(self.bound_s) else f", bound {self.bound_s:.3f} s"
        loss = "none" if self.train_loss is None else f"{self.train_loss:.4f}"
        lines = [
            f"round {self.server_round}: latency {self.round_s:.3f} s planned{bound}, "
            f"{self.observed_s:.3f} s observed; wireless time {self.wireless_s:.3f} s; "
            f"{len(self.blocks)} of {self.num_devices} devices active; train loss "
            f"{loss}"
        ]
        # Where the shares are the best ones, all devices finish together: no mark then.
        latest = [b for b in self.blocks if b.latency_s > self.round_s * (1 - 1e-6)]
        for block in self.blocks:
            mark = " <- slowest" if [block] == latest else ""
            reported = (
                ""
                if block.reported_compute_s is None
                else f" ({block.reported_compute_s:.3f} s {block.compute_clock})"
            )
            measured = (
                ""
                if block.measured_upload_s is None
                else f" ({block.measured_upload_s:.3f} s measured, share is "
                f"{block.uplink_limit or 'advice'})"
            )
            status = "" if block.status == "accepted" else f" [{block.status}]"
            lines.append(
                f"  block {block.block_index:2d} depth {block.depth:2d} "
                f"{block.device}: share {block.share:.4f}, compute "
                f"{block.compute_s:.3f} s{reported} + upload {block.upload_s:.3f} s"
                f"{measured} = {block.latency_s:.3f} s{mark}{status}"
            )
        for block in self.blocks:
            if block.exceeds_memory:
                peak, expected, offered = (
                    f"{(value or 0) / 1e6:.1f} MB"
                    for value in (
                        block.peak_memory_bytes,
                        block.required_memory_bytes,
                        block.memory_bytes,
                    )
                )
                lines.append(
                    f"  fault of the cost model: {block.device} took {peak} of memory "
                    f"for block {block.block_index} and offers {offered}; expected "
                    f"{expected}"
                )
        if self.num_excluded:
            lines.append(
                f"  {self.num_excluded} devices take no part: they lack the memory for "
                "any block, or rest after failures"
            )
        ignored = [b.ignored_arrays for b in self.blocks if b.ignored_arrays]
        if ignored:
            lines.append(
                f"  {len(ignored)} devices sent arrays beyond their block, "
                f"{sum(ignored)} in all: what they trained there is lost, and their "
                "uploads took longer than planned"
            )
        if self.refused:
            counts = ", ".join(f"{n} {why}" for why, n in sorted(self.refused.items()))
            lines.append(f"  refused updates: {counts}")
        return lines

    def _spread_line(self) -> str:
        return (
            f"step {self.server_round}: latency {self.round_s:.3f} s planned, "
            f"{self.measured_s:.3f} s measured; wireless time {self.wireless_s:.3f} s; "
            f"{self.num_devices} devices, "
            f"{self.exchanges} exchanges, {self.sent_bytes / 1e6:.1f} MB sent to them, "
            f"{self.received_bytes / 1e6:.1f} MB received; train loss "
            f"{self.train_loss:.4f}"
        )

    def final_line(self) -> str:
        """Sum a run up from its last record: metrics, rounds, wireless time, loss."""
        parts = [f"{k}={v:.4f}" for k, v in self.metrics.items() if k != "loss"]
        parts += [f"rounds={self.server_round}", f"wireless_s={self.wireless_s:.3f}"]
        parts += [f"loss={self.metrics['loss']:.4f}"] if "loss" in self.metrics else []
        return f"final: {' '.join(parts)}"

    def to_json(self) -> str:
        """Return the record as one line of strict JSON; what is not finite is null."""
        values = asdict(self)
        values["bound_s"] = _finite(self.bound_s)
        values["metrics"] = {k: _finite(v) for k, v in self.metrics.items()}
        return json.dumps(values, allow_nan=False)


def read_rounds(path: Path) -> list[RoundRecord]:
    """Read the records of a file that a `RoundLog` wrote, or is still writing.

    Raises
    ------
    UserError
        The file cannot be read, or a line of it is no record.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError(f"{path} cannot be read: {reason}.") from None
    # A line without an end is still being written.
    lines = text[: text.rfind("\n") + 1].splitlines()
    return [_read_record(line, f"{path}, line {n}") for n, line in enumerate(lines, 1)]


def _read_record(line: str, where: str) -> RoundRecord:
    try:
        values = json.loads(line)
        blocks = tuple(_known(BlockRecord, block) for block in values.pop("blocks", ()))
        values["bound_s"] = _or_nan(values.get("bound_s"))
        metrics = values.get("metrics", {})
        values["metrics"] = {name: _or_nan(value) for name, value in metrics.items()}
        return _known(RoundRecord, {**values, "blocks": blocks})
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{where} is no record of a round: {error}.") from None


def _known(record: type[_Record], values: Mapping[str, Any]) -> _Record:
    """Make a record of those values that it has fields for."""
    names = {f.name for f in fields(record)}
    return record(**{name: v for name, v in values.items() if name in names})


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


class RoundLog:
    """Appends records to a JSON-lines file.

    Parameters
    ----------
    path
        The file; its directory is made.
    num_bytes
        To go on with a run: the file's length after its last complete round. What is
        beyond, of a round that was cut off, is dropped. (Default: start a file.)

    Raises
    ------
    UserError
        There is such a file already, nothing is overwritten; or the one to go on with
        is shorter.
    """

    def __init__(self, path: Path, num_bytes: int | None = None) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if num_bytes:
            if not path.is_file() or path.stat().st_size < num_bytes:
                raise UserError(
                    f"{path} lacks rounds that the checkpoint beside it counts; put it "
                    "back, or give this run another output directory."
                )
            os.truncate(path, num_bytes)
            return
        path.touch()
        if num_bytes is None and path.stat().st_size:
            raise UserError(
                f"{path} holds the rounds of an earlier run; give this run another "
                "output directory, or move that file away."
            )
        os.truncate(path, 0)

    def append(self, record: RoundRecord) -> int:
        """Write one record, down to the disk; return the file's length."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(record.to_json() + "\n")
            file.flush()
            os.fsync(file.fileno())
            return file.tell()

    def last(self) -> RoundRecord | None:
        """Return the last record; None if there is none yet."""
        records = read_rounds(self.path)
        return records[-1] if records else None
