"""What a plan's rounds come to until a target, by runs that have reached it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lola_flwr.errors import UserError, si
from lola_flwr.run.target import Target, reached

if TYPE_CHECKING:
    from lola_flwr.planning import Forecast, Range, RunStatement
    from lola_flwr.report import Run
    from lola_flwr.system.devices import DeviceProfile

# What rounds to a target depend on besides, where a plan has no choice.
_PLANNED = {"tuning": "full", "method": "lola-deft"}
# By how much rounds may differ in the part of the blocks that they train.
_SAME_COVERAGE = 0.02


class Likely(NamedTuple):
    """A forecast, and what it is of."""

    target: Target
    num_runs: int
    forecast: Forecast

    def to_values(self) -> dict[str, Any]:
        """Return it as JSON knows it."""
        told = {"target": str(self.target), "num_runs": self.num_runs}
        return {**told, **asdict(self.forecast)}

    def line(self) -> str:
        """Say it in words."""
        found = self.forecast
        rounds = _between(found.rounds, lambda value: f"{value:.0f}")
        seconds = _between(found.wireless_s, lambda value: f"{value:.4g} s")
        joules = (
            ""
            if found.joules is None
            else f", {_between(found.joules, lambda value: si(value, 'J'))}"
        )
        several = self.num_runs > 1
        runs = f"{self.num_runs} runs" if several else "one run"
        rest = "and of the runs' rounds" if several else "but not of seeds"
        return (
            f"To {self.target}, as {runs} took: {rounds} rounds, {seconds} of wireless "
            f"time{joules}. In brackets: 90 % of draws of the channel, {rest}."
        )


def likely(
    run: RunStatement,
    fleet: Sequence[DeviceProfile],
    like: Sequence[Path],
    target: str | None,
    settings: Mapping[str, object],
) -> Likely:
    """Forecast what a target takes.

    Parameters
    ----------
    run, fleet
        What is planned, and for whom.
    like
        Directories of runs that have reached the target.
    target
        The target (default: the first run's own).
    settings
        Keys that rounds to a target depend on, as they are planned.

    Raises
    ------
    UserError
        A run does not tell: it had other settings, or never got there.
    """
    from lola_flwr.planning import forecast, planned_rounds
    from lola_flwr.report import Run

    if run.allocation.batch_sizes or run.channel.depends_on_time:
        raise UserError(
            "--like sums rounds up that are drawn one by one, and with "
            "--batch-size=auto, --channel, --mobility or --fading=gauss-markov they "
            "depend on those before; leave it out."
        )
    runs = [Run.read(directory) for directory in like]
    goal = Target.parse(target) if target else runs[0].target
    if goal is None:
        raise UserError(
            f"{like[0]} had no target; say what is to be reached: "
            "--target 'accuracy>=0.83'."
        )
    for finished, directory in zip(runs, like, strict=True):
        _require_alike(finished, directory, settings)
    needed = [_rounds_to(*told, goal) for told in zip(runs, like, strict=True)]
    planned = planned_rounds(run, fleet)
    for finished, directory, (_, there) in zip(runs, like, needed, strict=True):
        coverage = _coverage(finished, there, run.num_blocks)
        if abs(coverage - planned.coverage) > _SAME_COVERAGE:
            raise UserError(
                f"A round of {directory} trained {coverage:.0%} of {run.num_blocks} "
                f"blocks, one that is planned {planned.coverage:.0%}: it does not tell "
                "how many of these are needed. Plan for more devices, or give a run "
                "that is alike."
            )
    return Likely(goal, len(runs), forecast(planned, needed, seed=run.seed))


def _require_alike(run: Run, directory: Path, settings: Mapping[str, object]) -> None:
    for key, value in {**settings, **_PLANNED}.items():
        if run.config.get(key) != value:
            raise UserError(
                f"{directory} has {key}={run.config.get(key)!r}, and the plan "
                f"{value!r}: how many rounds are needed depends on it. Plan with the "
                "run's."
            )


def _rounds_to(run: Run, directory: Path, target: Target) -> tuple[int, int]:
    """Return the last round that was evaluated before a target was reached, and then.

    Raises
    ------
    UserError
        It never was.
    """
    course = run.tally.course(target.metric)
    spent = reached(course, target)
    if spent is None or not spent.server_round:
        target.require_in(dict.fromkeys(run.metric_names, 0.0))
        raise UserError(
            f"{directory} never reached {target} by its rounds; give one that did, or "
            "another --target."
        )
    rounds = [p.server_round for p in course if p.server_round < spent.server_round]
    return max(rounds, default=0), spent.server_round


def _coverage(run: Run, last_round: int, num_blocks: int) -> float:
    """Return the part of the blocks that rounds trained until one, mean."""
    trained = [
        len({b for part in parts if part.status == "accepted" for b in part.blocks})
        for record in run.rounds
        if record.server_round <= last_round
        for parts in [getattr(record, "blocks", ())]
    ]
    return sum(trained) / (len(trained) * num_blocks)


def _between(value: Range, written: Any) -> str:
    return f"{written(value.median)} ({written(value.low)} to {written(value.high)})"
