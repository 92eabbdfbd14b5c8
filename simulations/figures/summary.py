"""Means with confidence bands, and latency reductions, of simulated rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lola_flwr.arrays import Float64Array
from simulations.figures.latency import CONTENDERS
from simulations.figures.tables import Row

# What the others are compared with.
PROPOSED = ("exact", "jbba")
TARGET_REDUCTION = 0.40
_RESAMPLES = 2000


def summarize(rows: Sequence[Row], x: str) -> list[Row]:
    """Sum the rounds up at each point of a figure.

    Parameters
    ----------
    rows
        Rows of `simulations.figures.latency.simulate`.
    x
        The column that is the figure's horizontal axis.

    Returns
    -------
    One row for each point and allocator: the mean latency with its 95 % confidence
    band, the median, and by how much the exact allocation and JBBA fall below it. The
    reductions are those of the means (with a band) and the median over draws.

    Notes
    -----
    Bands are percentiles of a bootstrap over fleets. Rounds of one fleet are not
    independent, and where a baseline cannot avoid a device in a deep fade its latency
    has no finite variance, so that a normal approximation would be wrong twice. (With
    Rayleigh fading 1/log2(1 + snr) does not even have a finite mean: such a baseline's
    sample mean grows with the number of draws. The medians do not.)
    """
    points = sorted({float(row[x]) for row in rows})
    return [
        summary
        for point in points
        for summary in _summarize_point(
            [row for row in rows if float(row[x]) == point], x
        )
    ]


def _summarize_point(rows: Sequence[Row], x: str) -> list[Row]:
    names = [name for name in CONTENDERS if any(r["allocator"] == name for r in rows)]
    latency = {name: _column(rows, name, "round_s") for name in names}
    fleets = _column(rows, names[0], "fleet")
    means = _resampled_means(latency, fleets)
    summaries: list[Row] = []
    for name in names:
        low_s, high_s = np.percentile(means[name], (2.5, 97.5))
        summary: dict[str, str | int | float] = {
            x: rows[0][x],
            "allocator": name,
            "draws": latency[name].size,
            "mean_s": float(latency[name].mean()),
            "mean_low_s": float(low_s),
            "mean_high_s": float(high_s),
            "median_s": float(np.median(latency[name])),
            "mean_excluded": float(_column(rows, name, "excluded").mean()),
        }
        for proposed in PROPOSED:
            low, high = np.percentile(1 - means[proposed] / means[name], (2.5, 97.5))
            summary |= {
                f"{proposed}_reduction": float(
                    1 - latency[proposed].mean() / latency[name].mean()
                ),
                f"{proposed}_reduction_low": float(low),
                f"{proposed}_reduction_high": float(high),
                f"{proposed}_reduction_median": float(
                    np.median(1 - latency[proposed] / latency[name])
                ),
            }
        summaries.append(summary)
    return summaries


def _column(rows: Sequence[Row], allocator: str, key: str) -> Float64Array:
    """One column of one allocator's rows; rows come in the order of the draws."""
    return np.array([float(r[key]) for r in rows if r["allocator"] == allocator])


def _resampled_means(
    latency: Mapping[str, Float64Array], fleets: Float64Array
) -> dict[str, Float64Array]:
    """Mean of each allocator in every bootstrap sample of fleets, shape [R]."""
    _, fleet_of_draw = np.unique(fleets, return_inverse=True)
    draws_of_fleet = np.bincount(fleet_of_draw)  # [F]
    # The same seed everywhere: all allocators and points are resampled alike.
    chosen = np.random.default_rng(0).integers(
        draws_of_fleet.size, size=(_RESAMPLES, draws_of_fleet.size)
    )  # [R, F]
    total_draws = draws_of_fleet[chosen].sum(axis=1)
    return {
        name: np.bincount(fleet_of_draw, weights=values)[chosen].sum(axis=1)
        / total_draws
        for name, values in latency.items()
    }


def reduction_table(summary: Sequence[Row]) -> list[Row]:
    """Average the reductions over the points of a figure, for a table to read.

    Parameters
    ----------
    summary
        Rows of `summarize`.

    Returns
    -------
    One row for each allocator: percentages, rounded.
    """
    table: list[Row] = []
    for name in CONTENDERS:
        rows = [row for row in summary if row["allocator"] == name]
        if name == PROPOSED[0] or not rows:
            continue
        line: dict[str, str | int | float] = {"baseline": name}
        for proposed in PROPOSED:
            values = [100 * float(row[f"{proposed}_reduction"]) for row in rows]
            medians = [100 * float(row[f"{proposed}_reduction_median"]) for row in rows]
            line |= {
                f"{proposed}: mean %": round(float(np.mean(values)), 1),
                f"{proposed}: least %": round(min(values), 1),
                f"{proposed}: most %": round(max(values), 1),
                f"{proposed}: median %": round(float(np.mean(medians)), 1),
            }
        table.append(line)
    return table


def points_at_target(
    summary: Sequence[Row], x: str, baselines: Sequence[str]
) -> list[float]:
    """Return the points at which exact is far enough below the best of baselines.

    Parameters
    ----------
    summary
        Rows of `summarize`.
    x
        The figure's horizontal axis.
    baselines
        Allocators; at each point the one with the least mean latency counts.

    Returns
    -------
    Points where the mean latency falls by at least `TARGET_REDUCTION`, in order.
    """
    reached = []
    for point in sorted({float(row[x]) for row in summary}):
        mean_s = {
            str(row["allocator"]): float(row["mean_s"])
            for row in summary
            if float(row[x]) == point
        }
        best_s = min(mean_s[name] for name in baselines)
        if 1 - mean_s["exact"] / best_s >= TARGET_REDUCTION:
            reached.append(point)
    return reached
