"""Rows of learning curves, of what runs end with, and of rotation's effect."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lola_flwr.costs.estimated import estimate_costs
from lola_flwr.model.blocks import partition_parameters
from lola_flwr.model.loading import load_classifier
from simulations.figures.learning import LearningRun
from simulations.figures.tables import Row


def curve_rows(runs: Iterable[LearningRun]) -> list[Row]:
    """Return the primary metric at each evaluated round of each run."""
    return [
        {
            "task": run.task,
            "method": run.method,
            "seed": run.seed,
            "server_round": record["server_round"],
            "wireless_s": record["wireless_s"],
            "metric": run.metric,
            "value": record["metrics"][run.metric],
            "loss": record["metrics"]["loss"],
        }
        for run in runs
        for record in run.records
        if record["metrics"]
    ]


def outcome_rows(runs: Iterable[LearningRun]) -> list[Row]:
    """Sum each run up: metric, wireless time, memory of a device, samples seen.

    Memory is that of the active devices by the cost model. Samples are those of the
    accepted updates, at the configured batch size.
    """
    rows: list[Row] = []
    for run in runs:
        last = run.records[-1]
        memory_bytes = _memory_bytes(run.config)
        blocks = [block for record in run.records for block in record["blocks"]]
        active_bytes = memory_bytes[[block["block_index"] for block in blocks]]
        accepted = sum(block["status"] == "accepted" for block in blocks)
        rows.append(
            {
                "task": run.task,
                "method": run.method,
                "seed": run.seed,
                "metric": run.metric,
                "final": last["metrics"][run.metric],
                "wireless_s": last["wireless_s"],
                "mean_memory_bytes": float(active_bytes.mean()),
                "largest_memory_bytes": float(active_bytes.max()),
                "samples": accepted * int(run.config["batch-size"]),
            }
        )
    return rows


def _memory_bytes(config: Mapping[str, Any]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Memory that each block needs under a run's configuration, shape [N]."""
    model, _ = load_classifier(str(config["model"]), num_labels=2)
    shapes = {name: tuple(values.shape) for name, values in model.named_parameters()}
    return estimate_costs(
        shapes,
        partition_parameters(shapes),
        batch_size=int(config["batch-size"]),
        sequence_length=int(config["max-length"]),
        merged=config["method"] == "fedavg-full",
    ).memory_bytes


def outcome_table(outcomes: Sequence[Row]) -> list[Row]:
    """Average outcomes over seeds, for a table to read."""
    table: list[Row] = []
    for task, method in dict.fromkeys((r["task"], r["method"]) for r in outcomes):
        rows = [r for r in outcomes if (r["task"], r["method"]) == (task, method)]

        def mean(key: str, rows: Sequence[Row] = rows) -> float:
            return float(np.mean([float(row[key]) for row in rows]))

        finals = [float(row["final"]) for row in rows]
        table.append(
            {
                "task": task,
                "method": method,
                "seeds": len(rows),
                "final": f"{np.mean(finals):.4f} ± {np.std(finals):.4f}",
                "metric": rows[0]["metric"],
                "wireless time s": round(mean("wireless_s"), 1),
                "memory MiB, mean": round(mean("mean_memory_bytes") / 2**20, 1),
                "memory MiB, largest": round(mean("largest_memory_bytes") / 2**20, 1),
                "samples": round(mean("samples")),
            }
        )
    return table


def rotation_rows(runs: Sequence[LearningRun]) -> list[Row]:
    """Compare runs without and with rotation at equal wireless time.

    Parameters
    ----------
    runs
        Runs of `ROTATIONS`.

    Returns
    -------
    One row for each seed and method. The budget of a seed is the shorter of its two
    runs; of each run, the last evaluation within the budget counts. `largest_excess` is
    the largest ratio of a round's planned latency to the best possible one, minus 1: by
    construction no more than the method's eps.
    """
    rows: list[Row] = []
    for seed in sorted({run.seed for run in runs}):
        of_seed = [run for run in runs if run.seed == seed]
        budget_s = min(run.records[-1]["wireless_s"] for run in of_seed)
        for run in of_seed:
            within = [
                record
                for record in run.records
                if record["metrics"] and record["wireless_s"] <= budget_s
            ]
            if (
                not within
            ):  # so few rounds that the slower run was not evaluated in time
                continue
            rows.append(
                {
                    "task": run.task,
                    "method": run.method,
                    "rotation_eps": run.config["rotation-eps"],
                    "seed": seed,
                    "budget_s": budget_s,
                    "server_round": within[-1]["server_round"],
                    "metric": run.metric,
                    "value": within[-1]["metrics"][run.metric],
                    "largest_excess": max(
                        record["round_s"] / record["bound_s"] - 1
                        for record in run.records
                    ),
                }
            )
    return rows


def rotation_table(comparison: Sequence[Row]) -> list[Row]:
    """Average the comparison of `rotation_rows` over seeds."""
    table: list[Row] = []
    for eps in dict.fromkeys(row["rotation_eps"] for row in comparison):
        rows = [row for row in comparison if row["rotation_eps"] == eps]
        values = [float(row["value"]) for row in rows]
        table.append(
            {
                "rotation eps": eps,
                "seeds": len(rows),
                "budget s": round(
                    float(np.mean([float(row["budget_s"]) for row in rows])), 1
                ),
                f"{rows[0]['metric']} within it": (
                    f"{np.mean(values):.4f} ± {np.std(values):.4f}"
                ),
                "largest excess latency": round(
                    max(float(row["largest_excess"]) for row in rows), 4
                ),
            }
        )
    return table
