"""Runs as a report shows them: read from a directory, summed up, put into columns."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lola_flwr.errors import UserError
from lola_flwr.report.tally import COUNTS, Tally, count_of, extremes, parts_of
from lola_flwr.run.records import BlockRecord, Record, RoundRecord
from lola_flwr.run.round_log import LoggedRounds
from lola_flwr.run.target import Target

# What a page holds at most, which keeps it below 5 MB: rounds in its charts, parts of
# devices in those rounds that it shows in detail, and devices (rows of its maps).
MOST_ROUNDS = 5_000
MOST_PARTS = 25_000
MOST_DEVICES = 5_000
# The first, the last, the fastest and the slowest.
_FEWEST_IN_DETAIL = 4


@dataclass(frozen=True)
class Run:
    """One run.

    Parameters
    ----------
    name
        What the report calls it.
    rounds
        Its rounds. They are gone over once, and few are asked for again, so that they
        may be read as they are needed.
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
        rounds = LoggedRounds(rounds_path)
        if not len(rounds):
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

    @cached_property
    def tally(self) -> Tally:
        """What its rounds come to."""
        return Tally.of(self.rounds)

    @property
    def is_plan(self) -> bool:
        """Whether its rounds were only planned."""
        return self.tally.statuses == {"planned"}

    @property
    def metric_names(self) -> list[str]:
        """Names of the metrics that any round has, in their order."""
        found = (n for r in self.tally.rounds for n in (*r.start_metrics, *r.metrics))
        return list(dict.fromkeys(found))

    @property
    def num_planned_rounds(self) -> int:
        """Rounds that the configuration asks for; those that there are if unknown."""
        asked = self.config.get("rounds")
        return asked if isinstance(asked, int) else len(self.rounds)

    @property
    def joules(self) -> float | None:
        """Energy of all devices in all rounds; None where it is not known."""
        return self.tally.rounds[-1].joules

    @property
    def tells_energy(self) -> bool:
        """Whether it is known of any round what it took."""
        return any(record.joules for record in self.tally.rounds)

    @property
    def duration_s(self) -> float:
        """How long the rounds took here; 0 if the log does not tell."""
        return sum(record.measured_round_s for record in self.tally.rounds)

    @property
    def latency_target_s(self) -> float | None:
        """What a round was to take at most; 0 if any time, None if not known."""
        target = self.config.get("latency-target-s")
        return float(target) if isinstance(target, (int, float)) else None

    @property
    def ended_at_target(self) -> bool:
        """Whether its last round has reached what the configuration says."""
        target = self.target
        return target is not None and target.holds(self.tally.rounds[-1].metrics)

    @property
    def target(self) -> Target | None:
        """What an evaluation was to reach; None if nothing, or not known."""
        try:
            return Target.parse(str(self.config.get("target", "")))
        except UserError:
            return None

    @property
    def num_within_target(self) -> int:
        """Rounds that took place and no longer than the target."""
        target_s = (self.latency_target_s or math.inf) * (1 + 1e-9)
        return sum(
            r.skipped is None and r.observed_s <= target_s for r in self.tally.rounds
        )

    @property
    def learns(self) -> bool:
        """Whether it has any metric or loss to show."""
        figures = (
            value
            for r in self.tally.rounds
            for value in (r.train_loss, *r.start_metrics.values(), *r.metrics.values())
        )
        return any(value is not None and math.isfinite(value) for value in figures)

    @property
    def start(self) -> Mapping[str, float]:
        """Evaluation of the model that the run started from."""
        return self.tally.rounds[0].start_metrics

    @property
    def refused(self) -> Mapping[str, int]:
        """Refused updates of all rounds, counted by reason."""
        total: Counter[str] = Counter()
        for record in self.tally.rounds:
            total.update(_refused(record))
        return total

    def total_bytes(self, name: str) -> int | None:
        """Sum a count of bytes over all rounds; None if the log does not hold it."""
        known = [count for count in self.tally.bytes[name] if count is not None]
        return round(sum(known)) if known else None

    def last(self, metric: str) -> float | None:
        """Return the last value of a metric; None if the run has none."""
        values = [r.metrics[metric] for r in self.tally.rounds if metric in r.metrics]
        return values[-1] if values else None

    def mean_observed_s(self) -> float | None:
        """Return the mean latency of the rounds that took place."""
        latencies = [r.observed_s for r in self.tally.rounds if r.skipped is None]
        return sum(latencies) / len(latencies) if latencies else None

    def columns(
        self, most_rounds: int = MOST_ROUNDS, most_parts: int = MOST_PARTS
    ) -> dict[str, Any]:
        """Return the run as columns of numbers, rounded to six digits.

        The active devices' parts of all rounds stand one after the other; ``first``
        tells with which of them a round begins, and ``detailed`` which rounds have any.
        Of a long run those rounds are there with which no line misses a peak or a
        trough, and in detail the fastest and the slowest. ``meetings`` and ``memory``
        count all rounds.

        Parameters
        ----------
        most_rounds
            Rounds at most.
        most_parts
            Parts of devices at most.
        """
        tally = self.tally
        lines = {
            "planned_s": _latencies(tally.rounds, "round_s"),
            "observed_s": _latencies(tally.rounds, "observed_s"),
            "bound_s": _latencies(tally.rounds, "bound_s"),
        }
        metrics = {
            "train loss": [record.train_loss for record in tally.rounds],
            **{
                name: [record.metrics.get(name) for record in tally.rounds]
                for name in self.metric_names
            },
        }
        shown = extremes(
            [*lines.values(), *metrics.values(), *tally.bytes.values()],
            len(tally.rounds),
            most_rounds,
        )
        detailed = self._in_detail(lines["observed_s"], shown, most_parts)
        of_round = {place: self.rounds[place] for place in detailed}
        first = [0]
        for place in shown:
            active = tally.num_parts[place] if place in of_round else 0
            first.append(first[-1] + active)
        parts = [part for place in detailed for part in parts_of(of_round[place])]
        devices = sorted(tally.memory) if parts else []
        row_of = {device: row for row, device in enumerate(devices)}
        statuses = sorted(tally.statuses)
        rounds = [tally.rounds[place] for place in shown]

        def of_shown(values: Sequence[float | None]) -> list[float | None]:
            return rounded(values[place] for place in shown)

        return {
            "name": self.name,
            "is_plan": self.is_plan,
            "num_rounds": len(tally.rounds),
            "round": [record.server_round for record in rounds],
            "detailed": [n for n, place in enumerate(shown) if place in of_round],
            "wireless_s": rounded(record.wireless_s for record in rounds),
            **{name: of_shown(values) for name, values in lines.items()},
            "skipped": [record.skipped for record in rounds],
            "metrics": {name: of_shown(values) for name, values in metrics.items()},
            "start_metrics": dict(
                zip(self.start, rounded(self.start.values()), strict=True)
            ),
            "refused": [sum(_refused(record).values()) for record in rounds],
            "bytes": {name: of_shown(tally.bytes[name]) for name in COUNTS},
            "devices": devices,
            "statuses": statuses,
            "num_blocks": tally.num_blocks,
            "meetings": [
                [row_of[device], block, count]
                for (device, block), count in tally.meetings.items()
                if parts
            ],
            "memory": [
                [
                    row_of[device],
                    *rounded((known.needed_bytes, known.offered_bytes)),
                    known.numbers,
                    *rounded((known.peak_bytes,)),
                ]
                for device, known in tally.memory.items()
                if parts and known.needed_bytes is not None
            ],
            "first": first,
            **_part_columns(parts, row_of, statuses),
        }

    def _in_detail(
        self, observed_s: Sequence[float | None], shown: Sequence[int], most_parts: int
    ) -> list[int]:
        """Choose from rounds that are shown those that are shown in detail."""
        num_parts = [self.tally.num_parts[place] for place in shown]
        if len(self.tally.memory) > MOST_DEVICES:
            return []
        if sum(num_parts) <= most_parts:
            return list(shown)
        # As many of the largest as there is room for: then there is room for any.
        most = most_parts // max(num_parts)
        if most < _FEWEST_IN_DETAIL:
            return []
        chosen = extremes([[observed_s[n] for n in shown]], len(shown), most)
        return [shown[n] for n in chosen]


def _part_columns(
    parts: Sequence[BlockRecord], row_of: Mapping[str, int], statuses: Sequence[str]
) -> dict[str, Any]:
    """Return devices' parts as columns, one after the other."""
    return {
        "device": [row_of[part.device] for part in parts],
        "block": [part.block_index for part in parts],
        "numbers": [part.numbers for part in parts],
        "share": rounded(part.share for part in parts),
        "downlink_s": rounded(part.downlink_s for part in parts),
        "compute_s": rounded(part.compute_s for part in parts),
        "turn_s": rounded(part.turn_s for part in parts),
        "upload_s": rounded(part.upload_s for part in parts),
        "reported_s": rounded(part.reported_compute_s for part in parts),
        "status": [statuses.index(part.status) for part in parts],
        "measured_upload_s": rounded(part.measured_upload_s for part in parts),
        **{name: rounded(count_of(part, name) for part in parts) for name in COUNTS},
    }


def _refused(record: Record) -> Mapping[str, int]:
    return record.refused if isinstance(record, RoundRecord) else {}


def _latencies(rounds: Iterable[Record], name: str) -> list[float | None]:
    """Return a latency of each round; None where it was skipped."""
    return rounded(
        None if record.skipped is not None else getattr(record, name, None)
        for record in rounds
    )


def rounded(values: Iterable[float | None]) -> list[float | None]:
    """Return numbers to six digits; None where one is not finite or not known."""
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
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read: {reason}.") from None
    if not isinstance(description, dict):
        raise UserError(f"{path} describes no run.")
    return description
