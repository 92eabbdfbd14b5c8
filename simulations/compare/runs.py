"""Run one method on one task."""

from __future__ import annotations

from dataclasses import replace

from simulations.compare.d2ft_steps import run_d2ft
from simulations.compare.lola_rounds import run_lola
from simulations.compare.methods import Method, Point, Report, RunSettings
from simulations.compare.tasks import Task


def run_method(
    task: Task, method: Method, settings: RunSettings, report: Report
) -> list[Point]:
    """Run a method; ``report`` is called with each evaluated point.

    The task's model ends with the values that were learned.
    """
    run = run_d2ft if method.kind == "d2ft" else run_lola
    if method.batch_size is not None:
        settings = replace(settings, batch_size=method.batch_size)
    points: list[Point] = []

    def on_point(point: Point) -> None:
        points.append(point)
        report(point)

    run(task, method, settings, on_point)
    return points
