"""Run one method on one task."""

from __future__ import annotations

from dataclasses import replace

from lola_flwr.errors import UserError
from lola_flwr.model.adapters import adapt
from simulations.compare.d2ft_steps import run_d2ft
from simulations.compare.local_rounds import CONTENDERS, run_local
from simulations.compare.lola_rounds import run_lola
from simulations.compare.methods import Method, Point, Report, RunSettings
from simulations.compare.tasks import Task

_RUNS = {
    **dict.fromkeys(("lola", "fedavg-full"), run_lola),
    "d2ft": run_d2ft,
    **dict.fromkeys(CONTENDERS, run_local),
}


def run_method(
    task: Task, method: Method, settings: RunSettings, report: Report
) -> list[Point]:
    """Run a method; ``report`` is called with each evaluated point.

    The task's model ends with the values that were learned, in adapters where these
    are tuned.

    Raises
    ------
    UserError
        There is no such kind of method, or its tuning is refused.
    """
    run = _RUNS.get(method.kind)
    if run is None:
        raise UserError(f"kind = {method.kind!r} is none of {', '.join(_RUNS)}.")
    adapted = adapt(
        task.model, method.tuning, method.tuning_options, seed=settings.seed
    )
    task = replace(task, model=adapted, lr=method.lr or task.lr)
    if method.batch_size is not None:
        settings = replace(settings, batch_size=method.batch_size)
    points: list[Point] = []

    def on_point(point: Point) -> None:
        points.append(point)
        report(point)

    run(task, method, settings, on_point)
    return points
