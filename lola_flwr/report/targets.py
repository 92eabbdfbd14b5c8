"""What targets cost runs side by side: for a table, and for a curve of all targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from lola_flwr.report.runs import Run, rounded
from lola_flwr.run.target import Spent, Target, best_so_far, falls, reached

# Of a long run so many of the points that are better than all before are drawn.
_MOST_POINTS = 500


class Row(NamedTuple):
    """What a target cost a run.

    Parameters
    ----------
    target
        The target.
    name
        The run's name.
    spent
        What the run had spent when it got there; None if it never did.
    best
        The best that it came to; None if it has no such metric.
    """

    target: Target
    name: str
    spent: Spent | None
    best: float | None


def target_rows(
    runs: Sequence[Run], names: Sequence[str], targets: Sequence[Target]
) -> list[Row]:
    """Return what each target cost each run.

    Parameters
    ----------
    runs, names
        The runs, and what they are called.
    targets
        The targets; where there is none, those of the runs' configurations, or else the
        best that all runs have come to.

    Raises
    ------
    UserError
        No run has the metric of a target.
    """
    known = list(dict.fromkeys(name for run in runs for name in run.metric_names))
    for target in targets:
        if target.metric not in known:
            target.require_in(dict.fromkeys(known, 0.0))
    rows = []
    for target in targets or _configured(runs, known) or _reached_by_all(runs, known):
        for run, name in zip(runs, names, strict=True):
            course = run.tally.course(target.metric)
            best = best_so_far(course, falling=target.falls)
            rows.append(
                Row(
                    target,
                    name,
                    reached(course, target),
                    best[-1].value if best else None,
                )
            )
    return rows


def cost_columns(run: Run) -> dict[str, Any]:
    """Return by metric what each value that is better than all before cost a run."""
    columns = {}
    for metric in run.metric_names:
        best = best_so_far(run.tally.course(metric), falling=falls(metric))
        kept = [*best[:: len(best) // _MOST_POINTS + 1], *best[-1:]]
        points = list(dict.fromkeys(kept))
        columns[metric] = {
            "value": rounded(p.value for p in points),
            "wireless_s": rounded(p.wireless_s for p in points),
            "up_bytes": rounded(p.up_bytes for p in points),
            "down_bytes": rounded(p.down_bytes for p in points),
            "joules": rounded(p.joules for p in points),
        }
    return columns


def _configured(runs: Sequence[Run], known: Sequence[str]) -> list[Target]:
    """Return what the runs themselves were to reach, as far as any was evaluated."""
    targets = [run.target for run in runs]
    return list(dict.fromkeys(t for t in targets if t and t.metric in known))


def _reached_by_all(runs: Sequence[Run], known: Sequence[str]) -> list[Target]:
    """Return the best that all runs came to, in a metric that is to rise if any."""
    for metric in sorted(known, key=falls):
        falling = falls(metric)
        ends = [best_so_far(r.tally.course(metric), falling=falling) for r in runs]
        if all(ends):
            values = [best[-1].value for best in ends]
            worst = max(values) if falling else min(values)
            return [Target(metric, worst, falls=falling)]
    return []
