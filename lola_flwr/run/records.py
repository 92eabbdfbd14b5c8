"""What happened in a round: a record, as log lines and as a line of JSON."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # A worker may live in Python 3.10, whose typing lacks it.
    from typing import Self


@dataclass(frozen=True)
class BlockRecord:
    """One device's part in a round; seconds as planned unless ``reported``.

    ``ignored_arrays`` counts what it sent beyond its block and the head.
    ``measured_upload_s`` is on the server's clock, None where nothing tells;
    ``uplink_limit`` is what held the upload to its share, None if nothing did.
    ``payload_bytes`` is the message that the allocation counted on, ``received_bytes``
    the arrays in the one that came, ``sent_bytes`` the arrays sent to the device.
    Memory is what the block needs by the cost model, what the device offers, and at its
    peak what it measured, if it did. ``further_blocks`` are those that it trains behind
    the first. ``unexplained_s`` is how long it kept the round waiting for no known
    reason, None if it did not. ``downlink_s`` is how long it waits for its message, 0
    where nothing tells, and ``turn_s`` for its turn to send where devices take turns.
    ``joules`` is what it draws in that time by its powers and the seconds observed, or
    else planned, ``measured_compute_j`` what computing took by its sensors, if known.
    ``batch_size`` is the examples that it was asked for where rounds choose, and
    ``noise_scale`` that of its block's gradient. ``rank`` is how many components of its
    adapter it sends, where devices may send some of them.
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
    further_blocks: tuple[int, ...] = ()
    unexplained_s: float | None = None
    downlink_s: float = 0.0
    turn_s: float = 0.0
    measured_downlink_s: float | None = None
    batch_size: int | None = None
    noise_scale: float | None = None
    joules: float | None = None
    measured_compute_j: float | None = None
    rank: int | None = None

    def __post_init__(self) -> None:
        """JSON knows no tuples."""
        object.__setattr__(self, "further_blocks", tuple(self.further_blocks))

    @property
    def blocks(self) -> tuple[int, ...]:
        """All blocks that the device trains, from the input on."""
        return (self.block_index, *self.further_blocks)

    @property
    def numbers(self) -> str:
        """The blocks in words: ``"3"``, ``"3-5"``, ``"3-5,8"``."""
        runs: list[list[int]] = []
        for block in self.blocks:
            if runs and block == runs[-1][-1] + 1:
                runs[-1].append(block)
            else:
                runs.append([block])
        return ",".join(
            f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs
        )

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
        return self.downlink_s + self.compute_s + self.turn_s + self.upload_s


@dataclass(frozen=True)
class Record(ABC):
    """What any round comes to, whatever the method.

    Parameters
    ----------
    server_round
        Round, from 1.
    num_devices
        Devices K that the round could choose from.
    wireless_s
        Sum of ``observed_s`` up to and with this round.
    round_s
        Planned latency of the round.
    observed_s
        Latency with what was measured in place of what was planned; equals ``round_s``
        where nothing was.
    train_loss
        Mean loss over the examples that were trained on; None without any.
    skipped
        Why the round did not take place; None if it did.
    metrics
        Evaluation of the model after this round, by metric; empty where none was made.
    start_metrics
        In the run's first record: evaluation of the model that it started from.
    measured_round_s
        How long the round took here, from waiting for devices to its evaluation.
    joules
        Sum of all devices' energy up to and with this round; None where that of any is
        not known.
    """

    server_round: int
    num_devices: int
    wireless_s: float
    round_s: float = 0.0
    observed_s: float = 0.0
    train_loss: float | None = None
    skipped: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    start_metrics: Mapping[str, float] = field(default_factory=dict)
    measured_round_s: float = 0.0
    joules: float | None = None

    def lines(self) -> list[str]:
        """Return the record as log lines."""
        if self.skipped is not None:
            return [f"round {self.server_round} is skipped: {self.skipped}"]
        return self._lines()

    @abstractmethod
    def _lines(self) -> list[str]:
        """Return the lines of a round that took place."""

    def warning(self) -> str | None:
        """Return what went wrong in a round that took place; None if nothing did."""
        return None

    @abstractmethod
    def taken(self, seconds: float) -> Self:
        """Return the record of a round that took so long here."""

    def figures(self) -> dict[str, float]:
        """Return the round's figures by name, but for those of an evaluation."""
        known = {"train_loss": self.train_loss, "joules": self.joules}
        return {"wireless_s": self.wireless_s} | {
            name: value for name, value in known.items() if value is not None
        }

    def final_line(self) -> str:
        """Sum a run up from its last record: metrics, rounds, wireless time, loss."""
        parts = [f"{k}={v:.4f}" for k, v in self.metrics.items() if k != "loss"]
        parts += [f"rounds={self.server_round}", f"wireless_s={self.wireless_s:.3f}"]
        parts += [] if self.joules is None else [f"joules={self.joules:.3f}"]
        parts += [f"loss={self.metrics['loss']:.4f}"] if "loss" in self.metrics else []
        return f"final: {' '.join(parts)}"

    def to_json(self) -> str:
        """Return the record as one line of strict JSON; what is not finite is null.

        A line has the fields of all kinds of records, so that a file is one table.
        """
        values = {**_all_fields(), **asdict(self)}
        values["bound_s"] = _finite(values["bound_s"])
        for name in ("metrics", "start_metrics"):
            values[name] = {k: _finite(v) for k, v in values[name].items()}
        return json.dumps(values, allow_nan=False)


@dataclass(frozen=True)
class RoundRecord(Record):
    """One round of LoLa-DEFT.

    Parameters
    ----------
    num_excluded
        Devices that were left out where all others take part: they have not the memory
        for a block, or rest after failures.
    bound_s
        Lower bound of the best possible latency; nan if the allocator gives none.
    worth_gap
        Where the search for the most valuable blocks ended at its time limit: by how
        much others may at most be worth more, relative. None where none are.
    refused
        Refused replies, counted by reason.
    blocks
        Each active device's part.
    measured_strategy_s
        Seconds that the server itself took to plan the round and to step the model.
    measured_deadline_s
        How long it waited for replies at most, by what rounds take; None: as long as
        Flower waits.
    server_s
        How long the server itself should take beside ``round_s``, to plan, to send, to
        step the model and to keep it: as long as lately. 0 where nothing tells, as in a
        simulation.
    """

    num_excluded: int = 0
    bound_s: float = math.nan
    worth_gap: float | None = None
    refused: Mapping[str, int] = field(default_factory=dict)
    blocks: tuple[BlockRecord, ...] = ()
    measured_strategy_s: float = 0.0
    measured_deadline_s: float | None = None
    server_s: float = 0.0

    @property
    def round_j(self) -> float | None:
        """Energy of the round's devices; None where that of any is not known."""
        joules = [block.joules for block in self.blocks]
        return None if None in joules else sum(filter(None, joules))

    def _lines(self) -> list[str]:
        bound = "" if math.isnan(self.bound_s) else f", bound {self.bound_s:.3f} s"
        loss = "none" if self.train_loss is None else f"{self.train_loss:.4f}"
        lines = [
            f"round {self.server_round}: latency {self.round_s:.3f} s planned{bound}, "
            f"{self.observed_s:.3f} s observed; wireless time {self.wireless_s:.3f} s; "
            f"{_joules(self.round_j, self.joules)}"
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
            asked = {"batch": block.batch_size, "rank": block.rank}
            batch = "".join(f", {k} {n}" for k, n in asked.items() if n is not None)
            energy = "" if block.joules is None else f", {block.joules:.3f} J"
            downlink = f"downlink {block.downlink_s:.3f} s + " * (block.downlink_s > 0)
            turn = f"turn {block.turn_s:.3f} s + " * (block.turn_s > 0)
            lines.append(
                f"  block {block.numbers:>2s} depth {block.depth:2d} {block.device}: "
                f"share {block.share:.4f}{batch}, {downlink}compute "
                f"{block.compute_s:.3f} s{reported} + {turn}upload {block.upload_s:.3f}"
                f" s{measured} = {block.latency_s:.3f} s{mark}{energy}{status}"
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
                    f"for block {block.numbers} and offers {offered}; expected "
                    f"{expected}"
                )
        lines += [
            f"  {block.device} rests: its reply came {block.unexplained_s:.1f} s later "
            "than its computation, its upload and what others wait for explain"
            for block in self.blocks
            if block.unexplained_s is not None
        ]
        if self.worth_gap is not None:
            lines.append(
                "  the search for the most valuable blocks ended at its time limit: "
                f"others may be worth up to {self.worth_gap:.2%} more, and a faster "
                "machine may choose them"
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

    def warning(self) -> str | None:
        """Return that no update could be used, if so."""
        if not self.blocks or any(b.status == "accepted" for b in self.blocks):
            return None
        first = self.blocks[0]
        return f"no update could be used; {first.device}: {first.status}"

    def taken(self, seconds: float) -> Self:
        """Return the record of a round that the server took so long for."""
        return replace(self, measured_strategy_s=seconds)

    def figures(self) -> dict[str, float]:
        """Return the round's figures by name, but for those of an evaluation."""
        return {
            "round_s": self.round_s,
            "refused": sum(self.refused.values()),
            **super().figures(),
        }


@dataclass(frozen=True)
class StepRecord(Record):
    """One step of D2FT, in which the model is spread over the devices.

    Parameters
    ----------
    exchanges
        Messages that followed one upon the other.
    sent_bytes, received_bytes
        Bytes of the arrays in them, to and from all devices.
    measured_s
        How long all of that took.
    """

    exchanges: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    measured_s: float = 0.0

    def _lines(self) -> list[str]:
        return [
            f"step {self.server_round}: latency {self.round_s:.3f} s planned, "
            f"{self.measured_s:.3f} s measured; wireless time {self.wireless_s:.3f} s; "
            f"{self.num_devices} devices, {self.exchanges} exchanges, "
            f"{self.sent_bytes / 1e6:.1f} MB sent to them, "
            f"{self.received_bytes / 1e6:.1f} MB received; train loss "
            f"{self.train_loss:.4f}"
        ]

    def taken(self, seconds: float) -> Self:
        """Return the record of a step that took so long."""
        return replace(self, measured_s=seconds)

    def figures(self) -> dict[str, float]:
        """Return the step's figures by name, but for those of an evaluation."""
        return {
            "sent_bytes": self.sent_bytes,
            "received_bytes": self.received_bytes,
            **super().figures(),
        }


def _all_fields() -> dict[str, Any]:
    """Return what the fields say that one kind of record has and another lacks."""
    return {**asdict(RoundRecord(0, 0, 0.0)), **asdict(StepRecord(0, 0, 0.0))}


def added(joules: float | None, round_j: float | None) -> float | None:
    """Return a run's energy with one more round's; None where either is not known."""
    return None if joules is None or round_j is None else joules + round_j


def _joules(round_j: float | None, joules: float | None) -> str:
    if round_j is None:
        return ""
    total = "" if joules is None else f", {joules:.3f} J so far"
    return f"{round_j:.3f} J{total}; "


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
