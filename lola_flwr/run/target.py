"""A target of a run's evaluation, and what a run had spent when it got there."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lola_flwr.errors import UserError, brief

_FORM = re.compile(r"\s*([^\s<>=]+)\s*([<>]=)\s*([^\s<>=]+)\s*")
# Where nobody says which way a metric is to go: these are to fall, all others to rise.
_FALLING = ("loss", "perplexity", "error")


def falls(metric: str) -> bool:
    """Tell by a metric's name whether lower is better."""
    return any(word in metric for word in _FALLING)


@dataclass(frozen=True)
class Target:
    """What an evaluation is to reach.

    Parameters
    ----------
    metric
        Name of the metric.
    value
        What it is to come to.
    falls
        Whether it is to be at most that; else at least.
    """

    metric: str
    value: float
    falls: bool = False

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read a target: ``"accuracy>=0.83"`` or ``"perplexity<=20"``.

        Raises
        ------
        UserError
            The text is none.
        """
        found = _FORM.fullmatch(text)
        try:
            value = float(found[3]) if found else math.nan
        except ValueError:
            value = math.nan
        if found is None or not math.isfinite(value):
            raise UserError(
                f"target={brief(text)} must be a metric, >= or <=, and a number, in "
                "quotes: 'accuracy>=0.83' or 'perplexity<=20'."
            )
        return cls(found[1], value, falls=found[2] == "<=")

    def __str__(self) -> str:
        """Return the target as it is written."""
        return f"{self.metric}{'<=' if self.falls else '>='}{self.value:.12g}"

    def holds(self, metrics: Mapping[str, float]) -> bool:
        """Tell whether an evaluation has reached it."""
        value = metrics.get(self.metric, math.nan)
        return value <= self.value if self.falls else value >= self.value

    def require_in(self, metrics: Mapping[str, float]) -> None:
        """Refuse a target that no evaluation could ever reach.

        Raises
        ------
        UserError
            The evaluation has no such metric.
        """
        if self.metric not in metrics:
            raise UserError(
                f"target={str(self)!r}: the evaluation has no {self.metric!r}; it has "
                f"{', '.join(metrics) or 'no metrics'}."
            )


@dataclass(frozen=True)
class Spent:
    """What a run had spent when it was evaluated.

    Parameters
    ----------
    server_round
        Rounds until then; 0 before the first.
    value
        Value of the metric.
    wireless_s
        Wireless time, seconds.
    up_bytes, down_bytes
        Bytes of the arrays that were received from devices, and sent to them; None
        where the records do not tell.
    joules
        Energy of all devices; None where it is not known.
    """

    server_round: int
    value: float
    wireless_s: float
    up_bytes: float | None = None
    down_bytes: float | None = None
    joules: float | None = None


def reached(course: Iterable[Spent], target: Target) -> Spent | None:
    """Return the first point of a run's course at which a target holds, if any does.

    Parameters
    ----------
    course
        Evaluations of the target's metric, from the first on.
    target
        The target.
    """
    return next((p for p in course if target.holds({target.metric: p.value})), None)


def best_so_far(course: Iterable[Spent], *, falling: bool) -> list[Spent]:
    """Return those points of a course that are better than all before."""
    best: list[Spent] = []
    for point in course:
        if math.isfinite(point.value) and (
            not best
            or (
                point.value < best[-1].value
                if falling
                else point.value > best[-1].value
            )
        ):
            best.append(point)
    return best
