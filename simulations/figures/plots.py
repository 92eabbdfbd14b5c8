"""Drawing only: rows in, figures out.

One allocator looks the same in every figure: the colour says how blocks are matched, a
solid line that the shares of the band are the best ones, a dashed line that they are
equal. Colours are those of Okabe and Ito, which colour-blind readers can tell apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, PercentFormatter, ScalarFormatter

from lola_flwr.arrays import Float64Array
from simulations.figures.depth import WHOLE_MODEL
from simulations.figures.pages import SCREEN, Page
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
    "lola-deft": Style("LoLa-DEFT", BLUE, "s"),
    "rotation": Style("exact, rotation eps = 0.2", PINK, "^"),
}

X_LABELS = {
    "transmit_snr_db": "transmit SNR (dB)",
    "devices": "devices K",
    "bandwidth_mhz": "uplink bandwidth (MHz)",
}
_LOG_AXES = ("bandwidth_mhz", "devices")
# Up to its latencies a linear axis goes.
REGION = "crunch"


def latency_figure(summary: Sequence[Row], x: str, page: Page = SCREEN) -> Figure:
    """Draw mean latencies and the exact optimum's reductions.

    Parameters
    ----------
    summary
        Rows of `simulations.figures.summary.summarize`.
    x
        The horizontal axis, a key of `X_LABELS`.
    page
        Where the figure goes. In a paper latency is on a linear axis, up to that of the
        best matching for equal shares, `REGION`; what is longer runs out of it.
    """
    figure, (left, right) = page.panels(2, (12.5, 5.6))
    for name, style in STYLES.items():
        rows = [row for row in summary if row["allocator"] == name]
        if not rows:
            continue
        _band(left, rows, x, ("mean_s", "mean_low_s", "mean_high_s"), style, page)
        if name != "exact":
            reduction = [f"exact_reduction{part}" for part in ("", "_low", "_high")]
            _band(right, rows, x, reduction, style, page)
    if page.is_paper:
        of_region = [row for row in summary if row["allocator"] == REGION]
        left.set_ylim(0.0, 1.05 * max(numbers(of_region, "mean_s")))
    else:
        left.set_yscale("log")
        left.set_title("Mean round latency, with 95 % confidence band")
        right.set_title(
            f"Reduction by the exact optimum (dotted: {TARGET_REDUCTION:.0%})"
        )
    left.set_ylabel("mean round latency (s)")
    right.axhline(TARGET_REDUCTION, color=GREY, linestyle=":", linewidth=1.5)
    right.set_ylim(-0.02, 1.02)
    right.yaxis.set_major_formatter(PercentFormatter(xmax=1.0))
    right.set_ylabel(
        "exact optimum below it"
        if page.is_paper
        else "mean latency of the exact optimum below ..."
    )
    for axes in (left, right):
        axes.set_xlabel(X_LABELS[x])
        axes.grid(alpha=0.3)
        if page.is_paper:
            continue
        if x in _LOG_AXES:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(ScalarFormatter())
            axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(sorted({float(row[x]) for row in summary}))
    page.legend(figure, left, columns=5)
    return figure


def depth_figure(rows: Sequence[Row], page: Page = SCREEN) -> Figure:
    """Draw time and memory of each depth, measured and by the cost model.

    Parameters
    ----------
    rows
        Rows of `simulations.figures.depth.depth_rows`.
    page
        Where the figure goes.
    """
    figure, (left, right) = page.panels(2, (12.5, 4.8))
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
    _error_bars(left, places, rows, page)
    gflops_per_s = float(rows[0]["model_flops"]) / float(rows[0]["model_s"]) / 1e9
    left.plot(
        places,
        numbers(rows, "model_s"),
        color=BLACK,
        marker="o",
        markersize=page.scaled(6.0),
        linestyle="",
        label=f"cost model at {gflops_per_s:.0f} GFLOP/s (fitted)",
    )
    left.set_ylabel("CPU time of a step (s)")
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
        markersize=page.scaled(6.0),
        linestyle="",
        label="cost model",
    )
    right.plot(
        places,
        np.array(numbers(rows, "saved_with_dropout_bytes")) / 2**20,
        color=RED,
        marker="_",
        markersize=page.scaled(14.0),
        markeredgewidth=page.scaled(2.0),
        linestyle="",
        label="measured, with dropout",
    )
    right.set_ylabel("activations kept (MiB)")
    for axes in (left, right):
        axes.set_xticks(places, labels)
        axes.set_xlabel("depth of the trained layer (1: nearest the output)")
        axes.grid(axis="y", alpha=0.3)
        axes.legend(loc="upper left")
        axes.set_ylim(top=(1.5 if page.is_paper else 1.2) * axes.get_ylim()[1])
    return figure


def _error_bars(
    axes: Axes, places: Sequence[int], rows: Sequence[Row], page: Page
) -> None:
    """Draw the spread of the steps about their mean, on top of its bars."""
    total_s = np.array(numbers(rows, "forward_s")) + numbers(rows, "backward_s")
    axes.errorbar(
        places,
        total_s,
        yerr=numbers(rows, "deviation_s"),
        color=GREY,
        linestyle="",
        elinewidth=page.scaled(1.6),
        capsize=page.scaled(4.0),
        label="standard deviation of the steps",
    )


def memory_figure(rows: Sequence[Row], page: Page = SCREEN) -> Figure:
    """Draw the memory of a device that fine-tunes alone or in cooperation.

    Parameters
    ----------
    rows
        Rows of `simulations.figures.depth.memory_rows`.
    page
        Where the figure goes.
    """
    figure, (axes,) = page.panels(1, (8.5, 5.2))
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
        markersize=page.scaled(22.0),
        markeredgewidth=page.scaled(2.0),
        linestyle="",
        label="cooperating device with the deepest block",
    )
    means = numbers(rows, "mean_bytes")
    for place, mean, alone in zip(places, means, np.repeat(means[::2], 2), strict=True):
        saving = "" if mean == alone else f"\n−{1 - mean / alone:.0%}"
        text = f"{mean / 2**30:.2f}{saving}"
        axes.text(
            place,
            0.23,
            text,
            ha="center",
            va="center",
            fontsize=7 if page.is_paper else None,
        )
    axes.set_xticks(
        places,
        [f"{row['fine_tuning']}\n(batch {row['batch_size']})" for row in rows],
        fontsize=7 if page.is_paper else 8,
        rotation=90 if page.is_paper else 0,
    )
    of_whom = "" if page.is_paper else " of a device"
    axes.set_ylabel(f"mean memory{of_whom} (GiB)")
    axes.set_ylim(top=(1.6 if page.is_paper else 1.12) * axes.get_ylim()[1])
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(loc="upper left")
    return figure


def learning_figure(
    rows: Sequence[Row],
    methods: Sequence[str],
    page: Page = SCREEN,
    *,
    log_time: bool = True,
) -> Figure:
    """Draw a metric against wireless time, one panel for each task.

    Parameters
    ----------
    rows
        Rows of `simulations.figures.outcomes.curve_rows`.
    methods
        Methods in the order of the legend, keys of `STYLES`.
    page
        Where the figure goes. In a paper time is on a linear axis, up to where all
        methods but the slowest end; a dotted line is where that one ends.
    log_time
        Whether time is on a logarithmic axis, on a screen.
    """
    tasks = list(dict.fromkeys(str(row["task"]) for row in rows))
    figure, panels = page.panels(len(tasks), (max(8.0, 6.4 * len(tasks)), 4.9))
    for axes, task in zip(panels, tasks, strict=True):
        of_task = [row for row in rows if row["task"] == task]
        ends: dict[str, tuple[float, float]] = {}
        for method in methods:
            curve = mean_curve([row for row in of_task if row["method"] == method])
            if not len(curve):
                continue
            # Nothing coincides here: the broad line of the optimum has no use.
            style = replace(STYLES[method], marker_size=6.0, width=1.8)
            _draw(axes, curve.T, style, page)
            ends[method] = tuple(curve[-1, :2])
        if page.is_paper:
            _region_of_interest(axes, ends)
        elif log_time:
            axes.set_xscale("log")
        axes.set_xlabel("wireless time (s), mean over seeds")
        axes.set_ylabel(str(of_task[0]["metric"]).replace("_", " "))
        axes.set_title(task)
        axes.grid(alpha=0.3, which="both")
    page.legend(figure, panels[0], columns=2 * len(tasks))
    return figure


def mean_curve(rows: Sequence[Row]) -> Float64Array:
    """Return wireless time and metric, means over seeds, and the range of the seeds.

    Shape [evaluations, 4]: time, mean, least, largest. Of rounds that some seeds alone
    have reached there is no mean.
    """
    seeds = {row["seed"] for row in rows}
    curve = []
    for server_round in sorted({int(row["server_round"]) for row in rows}):
        at_round = [row for row in rows if row["server_round"] == server_round]
        if {row["seed"] for row in at_round} != seeds:
            continue
        values = numbers(at_round, "value")
        wireless_s = float(np.mean(numbers(at_round, "wireless_s")))
        curve.append((wireless_s, float(np.mean(values)), min(values), max(values)))
    return np.array(curve)


def _region_of_interest(axes: Axes, ends: Mapping[str, tuple[float, float]]) -> None:
    """Cut time where all methods but the slowest have ended."""
    slowest = max(ends, key=lambda name: ends[name][0])
    others = [end_s for name, (end_s, _) in ends.items() if name != slowest]
    if not others:
        return
    axes.set_xlim(0.0, 1.25 * max(others))
    end_s, value = ends[slowest]
    if end_s > axes.get_xlim()[1]:
        color = STYLES[slowest].color
        axes.axhline(value, color=color, linestyle=":", linewidth=0.9)
        axes.annotate(
            f"at {end_s:.0f} s",
            (1.0, value),
            (-2.0, -2.0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=7,
            color=color,
        )


def _band(
    axes: Axes,
    rows: Sequence[Row],
    x: str,
    keys: Sequence[str],
    style: Style,
    page: Page,
) -> None:
    """Draw a line and its band from three columns."""
    columns = [np.array(numbers(rows, key)) for key in (x, *keys)]
    _draw(axes, columns, style, page)


def _draw(
    axes: Axes,
    columns: Sequence[Float64Array] | Float64Array,
    style: Style,
    page: Page,
) -> None:
    """Draw x, a line, and the band between a lower and an upper line."""
    x, line, low, high = columns
    axes.plot(
        x,
        line,
        color=style.color,
        linestyle=style.line,
        marker=style.marker,
        markersize=page.scaled(style.marker_size),
        linewidth=page.scaled(style.width),
        label=style.label,
    )
    axes.fill_between(x, low, high, color=style.color, alpha=0.15, linewidth=0)
