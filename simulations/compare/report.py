"""The comparison as a table and as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
from matplotlib.figure import Figure

from lola_flwr.run.target import Target
from simulations.figures.tables import Row, numbers

# What other methods are compared with at equal wireless time.
ALL_BLOCKS = "lola-deft"

_PANELS = (
    ("wireless_s", "wireless time (s)", 1.0),
    ("flops", "operations (GFLOP)", 1e9),
    ("payload_bytes", "bytes sent (MB)", 1e6),
)


def comparison_rows(curves: Sequence[Row], target: Target | None = None) -> list[Row]:
    """Return one row for each task and method: means over seeds after the last round.

    Parameters
    ----------
    curves
        Points of all runs: task, method, seed, server_round, metric, value and what
        was spent until then.
    target
        What rows say the cost of: how many runs an evaluation found there, and what
        these had spent then, means.

    Returns
    -------
    Rows; ``all_blocks_then`` is where `ALL_BLOCKS` was at the same wireless time, empty
    if it was not measured then.
    """
    rows: list[Row] = []
    for (task, method), points in _by(curves, "task", "method"):
        # A target may have ended some runs before others.
        last = [course[-1] for _, course in _by(points, "seed")]
        values = numbers(last, "value")
        rows.append(
            {
                "task": str(task),
                "method": str(method),
                "metric": str(last[0]["metric"]),
                "mean": round(float(np.mean(values)), 4),
                "least": round(min(values), 4),
                "largest": round(max(values), 4),
                "all_blocks_then": _all_blocks_then(curves, last),
                "rounds": float(f"{np.mean(numbers(last, 'server_round')):.4g}"),
                "wireless_s": float(f"{np.mean(numbers(last, 'wireless_s')):.4g}"),
                "gflop": float(f"{np.mean(numbers(last, 'flops')) / 1e9:.4g}"),
                "sent_mb": round(
                    float(np.mean(numbers(last, "payload_bytes"))) / 1e6, 3
                ),
                "memory_mib": round(max(numbers(last, "memory_bytes")) / 2**20, 1),
                **({} if target is None else _cost_to(target, points)),
            }
        )
    return rows


def _cost_to(target: Target, points: Sequence[Row]) -> Row:
    """Return what a target cost a method's runs; no means unless all of them got there.

    Means over some of the runs alone would be those of the lucky ones.
    """
    firsts, runs = [], _by(points, "seed")
    for _, course in runs:
        there = [
            p for p in course if target.holds({str(p["metric"]): float(p["value"])})
        ]
        firsts += there[:1]
    row: dict[str, str | float] = {
        "target": str(target),
        "reached": f"{len(firsts)} of {len(runs)}",
    }
    for name, key, unit in (
        ("rounds_to_target", "server_round", 1.0),
        ("s_to_target", "wireless_s", 1.0),
        ("mb_to_target", "payload_bytes", 1e6),
        ("j_to_target", "joules", 1.0),
    ):
        # Of some methods it is not known what they take of batteries.
        known = [point for point in firsts if point.get(key, "") != ""]
        mean = np.mean(numbers(known, key)) / unit if known else np.nan
        row[name] = float(f"{mean:.4g}") if len(known) == len(runs) else ""
    return row


def _all_blocks_then(curves: Sequence[Row], ends: Sequence[Row]) -> float | str:
    """Return the metric of `ALL_BLOCKS` when other runs ended, on average."""
    values = []
    for end in ends:
        course = [
            p
            for p in curves
            if (p["task"], p["method"], p["seed"])
            == (end["task"], ALL_BLOCKS, end["seed"])
        ]
        if not course:
            return ""
        times, metrics = numbers(course, "wireless_s"), numbers(course, "value")
        end_s = float(end["wireless_s"])
        if not times[0] <= end_s <= times[-1]:
            return ""
        values.append(np.interp(end_s, times, metrics))
    return round(float(np.mean(values)), 4)


def comparison_figure(curves: Sequence[Row]) -> Figure:
    """Draw the primary metric against what was spent, one row of panels for each task.

    Parameters
    ----------
    curves
        As for `comparison_rows`.
    """
    tasks = list(dict.fromkeys(str(row["task"]) for row in curves))
    figure = Figure(figsize=(15, 4.6 * len(tasks)), layout="constrained")
    axes = figure.subplots(len(tasks), len(_PANELS), squeeze=False)
    methods = list(dict.fromkeys(str(row["method"]) for row in curves))
    for task, row in zip(tasks, axes, strict=True):
        for (key, label, unit), panel in zip(_PANELS, row, strict=True):
            for number, method in enumerate(methods):
                points = [
                    p for p in curves if (p["task"], p["method"]) == (task, method)
                ]
                means = [
                    (np.mean(numbers(p, key)) / unit, np.mean(numbers(p, "value")))
                    for _, p in _by(points, "server_round")
                ]
                if means:
                    panel.plot(
                        *zip(*means, strict=True),
                        label=method,
                        color=f"C{number % 10}",
                        linestyle=("-", "--", ":")[number // 10 % 3],
                        marker=".",
                    )
            panel.set_xscale("log")
            panel.set_xlabel(label)
            panel.set_title(task)
            panel.grid(alpha=0.3)
        row[0].set_ylabel(str(next(r for r in curves if r["task"] == task)["metric"]))
    axes[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _by(rows: Sequence[Row], *keys: str) -> list[tuple[tuple[object, ...], list[Row]]]:
    """Group rows by some columns, in the order of their first appearance."""

    def key(row: Row) -> tuple[object, ...]:
        return tuple(row[k] for k in keys)

    order = {k: n for n, k in enumerate(dict.fromkeys(map(key, rows)))}
    ordered = sorted(rows, key=lambda row: order[key(row)])
    return [(k, list(group)) for k, group in groupby(ordered, key)]
