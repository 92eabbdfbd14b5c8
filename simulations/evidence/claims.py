"""What is claimed of tasks, and whether runs bear it out."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lola_flwr.errors import UserError
from lola_flwr.run.target import Target
from simulations.figures.learning import LearningRun, Record
from simulations.figures.tables import Row

OURS, BASELINE = "lola-deft", "fedavg-full+shares"


@dataclass(frozen=True)
class Claim:
    """What is claimed of a task; all of it is about means over seeds.

    Parameters
    ----------
    config
        What the runs of both methods differ in from the app's own configuration.
    methods
        What those of one method do besides, by method.
    at_least
        What our runs end with, by metric.
    within
        By how much each of these metrics may be below the baseline's, from no more
        samples; None: by any, from any.
    time_share
        Our wireless time at most, relative to the baseline's.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    at_least: Mapping[str, float] = field(default_factory=dict)
    within: float | None = None
    time_share: float = 1.0


def read_claims(path: Path) -> tuple[dict[str, Mapping[str, Any]], dict[str, Claim]]:
    """Read what the two methods are, and the claims by task.

    Raises
    ------
    UserError
        The file is none, or says what claims do not have.
    """
    try:
        with path.open("rb") as file:
            content = tomllib.load(file)
        methods = {name: content["methods"][name] for name in (OURS, BASELINE)}
        tasks = {
            task: Claim(**{key.replace("-", "_"): value for key, value in said.items()})
            for task, said in content["tasks"].items()
        }
    except (OSError, tomllib.TOMLDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None
    return methods, tasks


def end_rows(runs: Sequence[LearningRun]) -> list[Row]:
    """Sum each run up: its last evaluation's metrics, and what was spent."""
    return [
        {
            "task": run.task,
            "method": run.method,
            "seed": run.seed,
            "rounds": len(run.records),
            "samples": sum(_samples(run, record) for record in run.records),
            "wireless_s": run.records[-1]["wireless_s"],
            "up_mb": _megabytes(run, "received_bytes"),
            "down_mb": _megabytes(run, "sent_bytes"),
            "reached": int(_has_reached(run)),
            **{
                name: value
                for name, value in run.records[-1]["metrics"].items()
                if name != "loss"
            },
        }
        for run in runs
    ]


def _has_reached(run: LearningRun) -> bool:
    """Tell whether a run ended where it was to; one without a target has."""
    target = str(run.config["target"])
    return not target or Target.parse(target).holds(run.records[-1]["metrics"])


def _samples(run: LearningRun, record: Record) -> int:
    return sum(
        int(block.get("batch_size") or run.config["batch-size"])
        for block in record["blocks"]
        if block["status"] == "accepted"
    )


def _megabytes(run: LearningRun, key: str) -> float:
    blocks = [block for record in run.records for block in record["blocks"]]
    return round(sum(float(block[key]) for block in blocks) / 1e6, 3)


def verdict_rows(task: str, claim: Claim, ends: Sequence[Row]) -> list[Row]:
    """Say of each part of a claim what was measured, and whether it holds.

    Parameters
    ----------
    task, claim
        The task, and what is claimed of it.
    ends
        Rows of `end_rows`, of both methods with the same seeds.
    """
    ours, baseline = (
        [row for row in ends if (row["task"], row["method"]) == (task, method)]
        for method in (OURS, BASELINE)
    )
    verdicts: list[Row] = []

    def judge(what: str, bound: str, value: float, *, holds: bool) -> None:
        verdicts.append(
            {
                "task": task,
                "seeds": len(ours),
                "what": what,
                "claimed": bound,
                "measured": round(value, 4),
                "holds": "yes" if holds else "no",
            }
        )

    for metric, least in claim.at_least.items():
        value = _mean(ours, metric)
        judge(metric, f"at least {least:g}", value, holds=value >= least)
        if claim.within is not None:
            behind = _mean(baseline, metric) - value
            judge(
                f"{metric} behind the baseline's",
                f"at most {claim.within:g}",
                behind,
                holds=behind <= claim.within,
            )
    if claim.within is not None:
        ratio = _mean(ours, "samples") / _mean(baseline, "samples")
        # Fewer where devices rest whose gradients point another way.
        judge("samples, of the baseline's", "at most 1", ratio, holds=ratio <= 1.0)
    there = [row["reached"] for row in (*ours, *baseline)]
    if not all(there):
        count = float(sum(map(int, there)))
        judge("runs that reached the target", f"{len(there)}", count, holds=False)
        return verdicts
    ratio = _mean(ours, "wireless_s") / _mean(baseline, "wireless_s")
    judge(
        "wireless time, of the baseline's",
        f"at most {claim.time_share:.4g}",
        ratio,
        holds=ratio <= claim.time_share,
    )
    return verdicts


def end_table(ends: Sequence[Row]) -> list[Row]:
    """Average what runs ended with over seeds, for a table to read."""
    table: list[Row] = []
    for task, method in dict.fromkeys((row["task"], row["method"]) for row in ends):
        rows = [r for r in ends if (r["task"], r["method"]) == (task, method)]
        metrics = [key for key in rows[0] if key not in _NO_METRICS]
        table.append(
            {
                "task": task,
                "method": method,
                "metrics, mean (by seed)": "; ".join(
                    f"{metric.replace('_', ' ')} {_mean(rows, metric):.3f} "
                    f"({', '.join(f'{float(row[metric]):.3f}' for row in rows)})"
                    for metric in metrics
                ),
                "rounds": round(_mean(rows, "rounds")),
                "samples": round(_mean(rows, "samples")),
                "wireless time s": round(_mean(rows, "wireless_s"), 1),
                "MB up": round(_mean(rows, "up_mb")),
                "MB down": round(_mean(rows, "down_mb")),
            }
        )
    return table


_NO_METRICS = (
    *("task", "method", "seed", "rounds", "samples"),
    *("wireless_s", "up_mb", "down_mb", "reached"),
)


def _mean(rows: Sequence[Row], key: str) -> float:
    return float(np.mean([float(row[key]) for row in rows]))
