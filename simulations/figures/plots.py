"""Drawing only: rows in, PNG out.

One allocator looks the same in every figure: the colour says how blocks are matched, a
solid line that the shares of the band are the best ones, a dashed line that they are
equal. Colours are those of Okabe and Ito, which colour-blind readers can tell apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, PercentFormatter, ScalarFormatter

from lola_flwr.arrays import Float64Array
from simulations.figures.depth import WHOLE_MODEL
from simulations.figures.summary import TARGET_REDUCTION
from simulations.figures.tables import Row, numbers

BLACK, GREY, LIGHT_GREY = "#000000", "#8C8C8C", "#C8C8C8"
BLUE, SKY = "#0072B2", "#56B4E9"
ORANGE, GREEN, RED, PINK = "#E69F00", "#009E73", "#D55E00", "#CC79A7"


@dataclass(frozen=True)
class Style:
    """How a contender is drawn."""

    label: str
    color: str
    marker: str
    line: str = "-"
    marker_size: float = 6.0
    width: float = 1.6


EQUAL = "--"
STYLES = {
    # Broad and first: what coincides with the optimum is drawn visibly on top of it.
    "exact": Style("exact optimum", BLUE, "o", marker_size=11.0, width=4.5),
    "jbba": Style("JBBA (dual ascent)", ORANGE, "x"),
    "crunch+shares": Style("CRUNCH + best shares", GREEN, "^"),
    "crunch": Style("CRUNCH + equal shares", GREEN, "v", EQUAL),
    "greedy": Style("greedy + equal shares", PINK, "D", EQUAL),
    "random+shares": Style("random + best shares", RED, "s"),
    "random": Style("random + equal shares", RED, "P", EQUAL),
    "fedavg-full+shares": Style("FedAvg-full (all devices), best shares", BLACK, "*"),
    "fedavg-full": Style("FedAvg-full (all devices), equal shares", BLACK, "X", EQUAL),
    "rotation": Style("exact, rotation eps = 0.2", PINK, "^"),
}

X_LABELS = {
    "transmit_snr_db": "transmit SNR (dB)",
    "devices": "devices K",
    "bandwidth_mhz": "uplink bandwidth (MHz)",
}
_LOG_AXES = ("bandwidth_mhz", "devices")


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def latency_figure(summary: Sequence[Row], x: str, title: str) -> Figure:
    """Draw mean latencies and the exact optimum's reductions.

    Parameters
    ----------
    summary
        Rows of `simulations.figures.summary.summarize`.
    x
        The horizontal axis, a key of `X_LABELS`.
    title
        Title of the figure; says what is our choice.
    """
    figure = Figure(figsize=(12.5, 5.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, style in STYLES.items():
        rows = [row for row in summary if row["allocator"] == name]
        if not rows:
            continue
        _band(left, rows, x, ("mean_s", "mean_low_s", "mean_high_s"), style)
        if name != "exact":
            reduction = [f"exact_reduction{part}" for part in ("", "_low", "_high")]
            _band(right, rows, x, reduction, style)
    left.set_yscale("log")
    left.set_ylabel("mean round latency (s)")
    left.set_title("Mean round latency, with 95 % confidence band", fontsize=10)
    right.axhline(TARGET_REDUCTION, color=GREY, linestyle=":", linewidth=1.5)
    right.set_ylim(-0.02, 1.02)
    right.yaxis.set_major_formatter(PercentFormatter(xmax=1.0))
    right.set_ylabel("mean latency of the exact optimum below ...")
    right.set_title(
        f"Reduction by the exact optimum (dotted: {TARGET_REDUCTION:.0%})", fontsize=10
    )
    for axes in (left, right):
        axes.set_xlabel(X_LABELS[x])
        axes.grid(alpha=0.3)
        if x in _LOG_AXES:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(ScalarFormatter())
            axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(sorted({float(row[x]) for row in summary}))
    figure.suptitle(title, fontsize=11)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=5,
        fontsize=9,
        handlelength=3.5,
    )
    return figure


def depth_figure(rows: Sequence[Row], title: str) -> Figure:
    """Draw time and memory of each depth, measured and by the cost model.

    Parameters
    ----------
    rows
        Rows of `simulations.figures.depth.depth_rows`.
    title
        Title of the figure.
    """
    figure = Figure(figsize=(12.5, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    # One place is left free in front of the whole model, which is no depth.
    places = [
        len(rows) + 1 if row["depth"] == WHOLE_MODEL else i + 1
        for i, row in enumerate(rows)
    ]
    labels = [
        "all" if row["depth"] == WHOLE_MODEL else str(row["depth"]) for row in rows
    ]
    forward = numbers(rows, "forward_s")
    left.bar(places, forward, color=SKY, label="forward pass, measured")
    left.bar(
        places,
        numbers(rows, "backward_s"),
        bottom=forward,
        color=ORANGE,
        hatch="//",
        edgecolor="white",
        label="backward pass, measured",
    )
    gflops_per_s = float(rows[0]["model_flops"]) / float(rows[0]["model_s"]) / 1e9
    left.plot(
        places,
        numbers(rows, "model_s"),
        color=BLACK,
        marker="o",
        linestyle="",
        label=f"cost model at {gflops_per_s:.0f} GFLOP/s (fitted)",
    )
    left.set_ylabel("computation latency of a step (s)")
    right.bar(
        places,
        np.array(numbers(rows, "saved_bytes")) / 2**20,
        color=SKY,
        label="measured",
    )
    right.plot(
        places,
        np.array(numbers(rows, "model_saved_bytes")) / 2**20,
        color=BLACK,
        marker="o",
        linestyle="",
        label="cost model",
    )
    right.plot(
        places,
        np.array(numbers(rows, "saved_with_dropout_bytes")) / 2**20,
        color=RED,
        marker="_",
        markersize=14,
        markeredgewidth=2,
        linestyle="",
        label="measured, with dropout",
    )
    right.set_ylabel("activations kept for the backward pass (MiB)")
    for axes in (left, right):
        axes.set_xticks(places, labels)
        axes.set_xlabel("depth of the trained layer (1: nearest the output)")
        axes.grid(axis="y", alpha=0.3)
        axes.legend(loc="upper left", fontsize=9)
        axes.set_ylim(top=1.2 * axes.get_ylim()[1])
    figure.suptitle(title, fontsize=11)
    return figure


def memory_figure(rows: Sequence[Row], title: str) -> Figure:
    """Draw the memory of a device that fine-tunes alone or in cooperation.

    Parameters
    ----------
    rows
        Rows of `simulations.figures.depth.memory_rows`.
    title
        Title of the figure.
    """
    figure = Figure(figsize=(8.5, 5.2), layout="constrained")
    axes = figure.subplots()
    parts = (
        ("weights_bytes", "weights", LIGHT_GREY),
        ("gradients_bytes", "gradients", ORANGE),
        ("activations_bytes", "activations", SKY),
    )
    # Pairs of bars: alone and cooperating beside each other for each batch size.
    places = [place // 2 + 0.42 * (place % 2) for place in range(len(rows))]
    bottom = np.zeros(len(rows))
    for key, label, color in parts:
        height = np.array(numbers(rows, key)) / 2**30
        axes.bar(places, height, 0.38, bottom=bottom, color=color, label=label)
        bottom += height
    axes.plot(
        places[1::2],
        np.array(numbers(rows[1::2], "largest_bytes")) / 2**30,
        color=BLACK,
        marker="_",
        markersize=22,
        markeredgewidth=2,
        linestyle="",
        label="cooperating device with the deepest block",
    )
    means = numbers(rows, "mean_bytes")
    for place, mean, alone in zip(places, means, np.repeat(means[::2], 2), strict=True):
        saving = "" if mean == alone else f"\n−{1 - mean / alone:.0%}"
        axes.text(place, 0.23, f"{mean / 2**30:.2f}{saving}", ha="center", va="center")
    axes.set_xticks(
        places,
        [f"{row['fine_tuning']}\n(batch {row['batch_size']})" for row in rows],
        fontsize=8,
    )
    axes.set_ylabel("average memory of a device (GiB)")
    axes.set_ylim(top=1.12 * axes.get_ylim()[1])
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(loc="upper left", fontsize=9)
    axes.set_title(title, fontsize=11)
    return figure


def learning_figure(
    rows: Sequence[Row], methods: Sequence[str], title: str, *, log_time: bool = True
) -> Figure:
    """Draw a metric against wireless time, one panel for each task.

    Parameters
    ----------
    rows
        Rows of `simulations.figures.outcomes.curve_rows`.
    methods
        Methods in the order of the legend, keys of `STYLES`.
    title
        Title of the figure.
    log_time
        Whether time is on a logarithmic axis.
    """
    tasks = list(dict.fromkeys(str(row["task"]) for row in rows))
    figure = Figure(figsize=(max(8.0, 6.4 * len(tasks)), 4.9), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for axes, task in zip(panels, tasks, strict=True):
        of_task = [row for row in rows if row["task"] == task]
        for method in methods:
            _learning_curve(
                axes, [row for row in of_task if row["method"] == method], method
            )
        if log_time:
            axes.set_xscale("log")
        axes.set_xlabel("wireless time (s), mean over seeds")
        axes.set_ylabel(str(of_task[0]["metric"]))
        axes.set_title(task, fontsize=10)
        axes.grid(alpha=0.3, which="both")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=2 * len(tasks),
        fontsize=9,
        handlelength=3.5,
    )
    figure.suptitle(title, fontsize=11)
    return figure


def _learning_curve(axes: Axes, rows: Sequence[Row], method: str) -> None:
    """Mean over seeds at each evaluated round, and the range of the seeds."""
    curve = []
    for server_round in sorted({int(row["server_round"]) for row in rows}):
        at_round = [row for row in rows if row["server_round"] == server_round]
        values = numbers(at_round, "value")
        wireless_s = float(np.mean(numbers(at_round, "wireless_s")))
        curve.append((wireless_s, float(np.mean(values)), min(values), max(values)))
    if not curve:
        return
    wireless_s, mean, low, high = np.array(curve).T
    # Nothing coincides here: the broad line of the optimum has no use.
    style = replace(STYLES[method], marker_size=6.0, width=1.8)
    _draw(axes, (wireless_s, mean, low, high), style)


def _band(
    axes: Axes, rows: Sequence[Row], x: str, keys: Sequence[str], style: Style
) -> None:
    """Draw a line and its band from three columns."""
    columns = [np.array(numbers(rows, key)) for key in (x, *keys)]
    _draw(axes, columns, style)


def _draw(axes: Axes, columns: Sequence[Float64Array], style: Style) -> None:
    """Draw x, a line, and the band between a lower and an upper line."""
    x, line, low, high = columns
    axes.plot(
        x,
        line,
        color=style.color,
        linestyle=style.line,
        marker=style.marker,
        markersize=style.marker_size,
        linewidth=style.width,
        label=style.label,
    )
    axes.fill_between(x, low, high, color=style.color, alpha=0.15, linewidth=0)
