"""Runs as a report shows them: read from a directory, summed up, put into columns."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lola_flwr.errors import UserError
from lola_flwr.run.records import BlockRecord, Record, RoundRecord, StepRecord
from lola_flwr.run.round_log import read_rounds

# Bytes up as the allocation counted on them, as received, and bytes down.
_COUNTS = ("payload_bytes", "received_bytes", "sent_bytes")


@dataclass(frozen=True)
class Run:
    """One run.

    Parameters
    ----------
    name
        What the report calls it.
    rounds
        Its rounds.
    description
        What `lola_flwr.run.directory.describe_run` writes; empty if it is not known.
    """

    name: str
    rounds: Sequence[Record]
    description: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path, name: str | None = None) -> Run:
        """Read a run's directory, or its ``rounds.jsonl``.

        Raises
        ------
        UserError
            There are no rounds, or a file of the run cannot be read.
        """
        directory = Path(path)
        if directory.is_file():
            rounds_path, directory = directory, directory.parent
        else:
            rounds_path = directory / "rounds.jsonl"
        if not rounds_path.is_file():
            raise UserError(
                f"{path} has no rounds.jsonl; give the directory of a run, which "
                "`lola-flwr simulate` names at its end."
            )
        rounds = read_rounds(rounds_path)
        if not rounds:
            raise UserError(f"{rounds_path} holds no round yet.")
        return cls(
            name=name or directory.resolve().name,
            rounds=rounds,
            description=_read_description(directory / "run.json"),
        )

    @property
    def config(self) -> Mapping[str, Any]:
        """The run's configuration."""
        config: Mapping[str, Any] = self.description.get("config", {})
        return config

    @property
    def is_plan(self) -> bool:
        """Whether its rounds were only planned."""
        statuses = {block.status for record in self.rounds for block in _blocks(record)}
        return statuses == {"planned"}

    @property
    def metric_names(self) -> list[str]:
        """Names of the metrics that any round has, in their order."""
        found = (n for r in self.rounds for n in (*r.start_metrics, *r.metrics))
        return list(dict.fromkeys(found))

    @property
    def num_planned_rounds(self) -> int:
        """Rounds that the configuration asks for; those that there are if unknown."""
        asked = self.config.get("rounds")
        return asked if isinstance(asked, int) else len(self.rounds)

    @property
    def duration_s(self) -> float:
        """How long the rounds took here; 0 if the log does not tell."""
        return sum(record.measured_round_s for record in self.rounds)

    @property
    def latency_target_s(self) -> float | None:
        """What a round was to take at most; 0 if any time, None if not known."""
        target = self.config.get("latency-target-s")
        return float(target) if isinstance(target, (int, float)) else None

    @property
    def num_within_target(self) -> int:
        """Rounds that took place and no longer than the target."""
        target_s = (self.latency_target_s or math.inf) * (1 + 1e-9)
        return sum(r.skipped is None and r.observed_s <= target_s for r in self.rounds)

    @property
    def learns(self) -> bool:
        """Whether it has any metric or loss to show."""
        figures = (
            value
            for r in self.rounds
            for value in (r.train_loss, *r.start_metrics.values(), *r.metrics.values())
        )
        return any(value is not None and math.isfinite(value) for value in figures)

    @property
    def start(self) -> Mapping[str, float]:
        """Evaluation of the model that the run started from."""
        return self.rounds[0].start_metrics

    @property
    def refused(self) -> Mapping[str, int]:
        """Refused updates of all rounds, counted by reason."""
        total: Counter[str] = Counter()
        for record in self.rounds:
            total.update(_refused(record))
        return total

    def total_bytes(self, name: str) -> int | None:
        """Sum a count of bytes over all rounds; None if the log does not hold it."""
        known = [count for count in self._bytes(name) if count is not None]
        return round(sum(known)) if known else None

    def _bytes(self, name: str) -> list[float | None]:
        """Return a count of bytes of each round; None where it is not known."""
        counts = []
        for record in self.rounds:
            # A model that is spread over devices has no blocks of theirs.
            parts = [record] if isinstance(record, StepRecord) else _blocks(record)
            known = [count for part in parts if (count := _count(part, name))]
            counts.append(sum(known) if known else None)
        return counts

    def last(self, metric: str) -> float | None:
        """Return the last value of a metric; None if the run has none."""
        values = [r.metrics[metric] for r in self.rounds if metric in r.metrics]
        return values[-1] if values else None

    def mean_observed_s(self) -> float | None:
        """Return the mean latency of the rounds that took place."""
        latencies = [r.observed_s for r in self.rounds if r.skipped is None]
        return sum(latencies) / len(latencies) if latencies else None

    def columns(self) -> dict[str, Any]:
        """Return the run as columns of numbers, rounded to six digits.

        The active devices' parts of all rounds stand one after the other; ``first``
        tells with which of them a round begins.
        """
        blocks = [block for record in self.rounds for block in _blocks(record)]
        devices = sorted({block.device for block in blocks})
        row_of = {device: row for row, device in enumerate(devices)}
        statuses = sorted({block.status for block in blocks})
        first = [0]
        for record in self.rounds:
            first.append(first[-1] + len(_blocks(record)))
        return {
            "name": self.name,
            "is_plan": self.is_plan,
            "round": [record.server_round for record in self.rounds],
            "wireless_s": _rounded(record.wireless_s for record in self.rounds),
            "planned_s": _latencies(self.rounds, "round_s"),
            "observed_s": _latencies(self.rounds, "observed_s"),
            "bound_s": _latencies(self.rounds, "bound_s"),
            "skipped": [record.skipped for record in self.rounds],
            "metrics": {
                "train loss": _rounded(record.train_loss for record in self.rounds),
                **{
                    name: _rounded(r.metrics.get(name) for r in self.rounds)
                    for name in self.metric_names
                },
            },
            "start_metrics": dict(
                zip(self.start, _rounded(self.start.values()), strict=True)
            ),
            "refused": [sum(_refused(record).values()) for record in self.rounds],
            "bytes": {name: _rounded(self._bytes(name)) for name in _COUNTS},
            "devices": devices,
            "statuses": statuses,
            "num_blocks": max((b.block_index + b.depth for b in blocks), default=0),
            "first": first,
            "device": [row_of[block.device] for block in blocks],
            "block": [block.block_index for block in blocks],
            "blocks": [list(block.blocks) for block in blocks],
            "numbers": [block.numbers for block in blocks],
            "share": _rounded(block.share for block in blocks),
            "compute_s": _rounded(block.compute_s for block in blocks),
            "upload_s": _rounded(block.upload_s for block in blocks),
            "reported_s": _rounded(block.reported_compute_s for block in blocks),
            "status": [statuses.index(block.status) for block in blocks],
            "needed_bytes": _rounded(b.required_memory_bytes for b in blocks),
            "memory_bytes": _rounded(b.memory_bytes for b in blocks),
            "peak_bytes": _rounded(b.peak_memory_bytes for b in blocks),
            "measured_upload_s": _rounded(block.measured_upload_s for block in blocks),
            **{
                name: _rounded(_count(block, name) for block in blocks)
                for name in _COUNTS
            },
        }


def _blocks(record: Record) -> Sequence[BlockRecord]:
    return record.blocks if isinstance(record, RoundRecord) else ()


def _refused(record: Record) -> Mapping[str, int]:
    return record.refused if isinstance(record, RoundRecord) else {}


def _count(block: BlockRecord | StepRecord, name: str) -> float | None:
    """Return a count of bytes; None where the record holds none."""
    return getattr(block, name, 0) or None


def _latencies(rounds: Iterable[Record], name: str) -> list[float | None]:
    """Return a latency of each round; None where it was skipped."""
    return _rounded(
        None if record.skipped is not None else getattr(record, name, None)
        for record in rounds
    )


def _rounded(values: Iterable[float | None]) -> list[float | None]:
    return [
        None if value is None or not math.isfinite(value) else float(f"{value:.6g}")
        for value in values
    ]


def _read_description(path: Path) -> Mapping[str, Any]:
    if not path.exists():
        return {}
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None
    if not isinstance(description, dict):
        raise UserError(f"{path} describes no run.")
    return description
