"""How much of its model each device prunes, and its share of the band, for one round.

Device k, with the rate r and the share b of the band, ends a round at ::

    compute_s - r * compute_saved_s + (upload_s - r * upload_saved_s) / b

The last device is to end as early as possible, where the shares add up to one, no rate
is above ``max_rate``, and the devices' mean rate, by their weights, is no higher than
``mean_rate``. What asks for the mean: a device that prunes the least share r of a
matrix by its norm leaves out no more than r of its squared norm, so that a bound on
how far all are from the whole model is one on the mean of their rates.

`by_descent` alternates between the two, each exactly, as block coordinate descent does.
It ends where neither alone can do better, which need not be where both can do no
better: once all devices end together, and the mean is used up or one has the highest
rate, other rates let nobody end earlier before the shares change too. `jointly` finds
the least time of all, by bisection over it: with a deadline, the share that a device
needs is convex in its rate, and what is left is to spend the mean where it saves most
of the band.

Source: the problem is our reading of JCPBA, arXiv:2602.01024, as `simulations.compare.
jcpba` says.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lola_flwr.allocation.shares import best_shares
from lola_flwr.arrays import Float64Array
from lola_flwr.errors import UserError

_MAX_PASSES = 100
_BISECTIONS = 100


@dataclass(frozen=True, kw_only=True, eq=False)
class PruningProblem:
    """A round of K devices that prune.

    Parameters
    ----------
    compute_s, upload_s
        What each computes, and uploads over the whole band, without pruning; seconds,
        shape [K].
    compute_saved_s, upload_saved_s
        What a rate of one would take off; seconds, shape [K].
    weights
        What each counts in the mean, shape [K].
    mean_rate, max_rate
        The highest mean of the rates, and the highest rate.

    Raises
    ------
    UserError
        A number is out of its range, or shapes differ.
    """

    compute_s: Float64Array
    upload_s: Float64Array
    compute_saved_s: Float64Array
    upload_saved_s: Float64Array
    weights: Float64Array
    mean_rate: float
    max_rate: float

    def __post_init__(self) -> None:
        """Check all numbers."""
        count = np.shape(self.compute_s)
        for name in ("upload_s", "compute_saved_s", "upload_saved_s", "weights"):
            if (
                np.shape(getattr(self, name)) != count
                or len(count) != 1
                or not count[0]
            ):
                raise UserError(
                    f"{name} has shape {np.shape(getattr(self, name))}, and compute_s "
                    f"{count}; give one number for each of at least one device."
                )
        self._require("weights", self.weights, self.weights > 0)
        self._require("compute_saved_s", self.compute_saved_s, self.compute_saved_s > 0)
        self._require("upload_saved_s", self.upload_saved_s, self.upload_saved_s >= 0)
        for name in ("compute", "upload"):
            whole, saved = getattr(self, f"{name}_s"), getattr(self, f"{name}_saved_s")
            # Something is always uploaded: a message is never empty.
            least = whole >= saved if name == "compute" else whole > saved
            self._require(f"{name}_s", whole, least)
        if not 0 <= self.mean_rate <= self.max_rate < 1:
            raise UserError(
                f"mean_rate={self.mean_rate} and max_rate={self.max_rate} of pruning "
                "must be at least 0 and below 1, and the mean no higher than the rest."
            )

    def _require(self, name: str, values: Float64Array, holds: object) -> None:
        wrong = np.flatnonzero(~(np.isfinite(values) & np.asarray(holds)))
        if wrong.size:
            raise UserError(
                f"{name} of device {wrong[0]} is {values[wrong[0]]}; it must be finite "
                "and positive, and more than pruning saves."
            )

    @property
    def budget(self) -> Float64Array:
        """What a rate of one of each device adds to the mean, shape [K]."""
        return np.asarray(self.weights / self.weights.sum())

    def ends_s(self, rates: Float64Array, shares: Float64Array) -> Float64Array:
        """Return when each device has uploaded, seconds, shape [K]."""
        uploads_s = self.upload_s - rates * self.upload_saved_s
        computed_s = self.compute_s - rates * self.compute_saved_s
        return np.asarray(computed_s + uploads_s / shares)


@dataclass(frozen=True, eq=False)
class PruningPlan:
    """What a round's devices prune and send with.

    Parameters
    ----------
    rates, shares
        Rate of pruning, and share of the band, of each device, shape [K].
    round_s
        When the last one has uploaded, seconds.
    steps_s
        What the round took at the beginning and after each pass of the descent, which
        never rises; of `jointly`, ``round_s`` alone.
    """

    rates: Float64Array
    shares: Float64Array
    round_s: float
    steps_s: tuple[float, ...]


def best_rates(problem: PruningProblem, shares: Float64Array) -> Float64Array:
    """Return the rates that end the round earliest under given shares, shape [K].

    Nobody prunes more than the others make it wait.
    """
    ends_s = problem.upload_s / shares + problem.compute_s
    saved_s = problem.upload_saved_s / shares + problem.compute_saved_s
    # Lowering the time from the last end on, device after device begins to prune: the
    # mean is used up where the line through those that do meets it.
    order = np.argsort(-ends_s, kind="stable")
    spent = problem.budget[order] / saved_s[order]
    reached_s = (np.cumsum(spent * ends_s[order]) - problem.mean_rate) / np.cumsum(
        spent
    )
    following = np.append(ends_s[order][1:], -np.inf)
    deadline_s = reached_s[np.argmax(reached_s >= following)]
    deadline_s = max(deadline_s, float((ends_s - problem.max_rate * saved_s).max()))
    rates = np.clip((ends_s - deadline_s) / saved_s, 0.0, problem.max_rate)
    return _within_mean(problem, rates)


def shares_for(problem: PruningProblem, rates: Float64Array) -> Float64Array:
    """Return the shares that end the round earliest under given rates, shape [K]."""
    return best_shares(
        problem.compute_s - rates * problem.compute_saved_s,
        problem.upload_s - rates * problem.upload_saved_s,
    )


def by_descent(problem: PruningProblem, tolerance: float = 1e-6) -> PruningPlan:
    """Alternate between rates and shares, from equal shares without pruning.

    Ends after the shares of a pass that has saved no more than a part ``tolerance``.
    """
    count = problem.compute_s.size
    rates, shares = np.zeros(count), np.full(count, 1.0 / count)
    steps_s = [float(problem.ends_s(rates, shares).max())]
    for _ in range(_MAX_PASSES):
        rates = best_rates(problem, shares)
        shares = shares_for(problem, rates)
        steps_s.append(float(problem.ends_s(rates, shares).max()))
        if steps_s[-1] >= steps_s[-2] * (1 - tolerance):
            break
    return PruningPlan(rates, shares, steps_s[-1], tuple(steps_s))


def jointly(problem: PruningProblem) -> PruningPlan:
    """Return the rates and shares with which no round ends earlier."""
    plan = by_descent(problem)
    if not problem.mean_rate:
        return plan
    best, most_s = plan.rates, plan.round_s
    all_pruned = np.full(best.size, problem.max_rate)
    # Nobody ends earlier than alone in the band, with all pruned that may be.
    least_s = float(problem.ends_s(all_pruned, np.ones(best.size)).max())
    for _ in range(_BISECTIONS):
        middle_s = (least_s + most_s) / 2
        if not least_s < middle_s < most_s:
            break
        rates = _thriftiest_rates(problem, middle_s)
        if rates is None:
            least_s = middle_s
        else:
            best, most_s = rates, middle_s
    shares = shares_for(problem, best)
    round_s = float(problem.ends_s(best, shares).max())
    return PruningPlan(best, shares, round_s, (round_s,))


def _thriftiest_rates(
    problem: PruningProblem, deadline_s: float
) -> Float64Array | None:
    """Return the rates that need least of the band to end by then; None: all too much.

    The share that a device needs falls with its rate, the less the more it prunes, and
    by ``gain / left_s**2``, where ``left_s`` is what its upload has. So what has it
    prune up to where that is the same for all, by their weights, is that ``left_s`` is
    in proportion to ``sqrt(gain / weight)``.
    """
    late_s = problem.compute_s - deadline_s
    saved_s = problem.compute_saved_s
    gain = problem.upload_s * saved_s - problem.upload_saved_s * late_s
    if (late_s >= problem.max_rate * saved_s).any() or (gain <= 0).any():
        return None  # somebody would still be computing
    slope = np.sqrt(gain / problem.budget)

    def rates_at(factor: Float64Array) -> Float64Array:
        rates = (factor[..., None] * slope + late_s) / saved_s
        return np.asarray(np.clip(rates, 0.0, problem.max_rate))

    # The mean is piecewise linear in the factor: its corners tell all of it.
    begins, ends = -late_s / slope, (problem.max_rate * saved_s - late_s) / slope
    corners = np.unique(np.maximum([0.0, *begins, *ends], 0.0))
    means = rates_at(corners) @ problem.budget
    if means[0] >= problem.mean_rate:
        return None
    factor = np.interp(problem.mean_rate, means, corners)
    rates = _within_mean(problem, rates_at(np.asarray(factor)))
    left_s = rates * saved_s - late_s
    if (left_s <= 0).any():
        return None
    needed = (problem.upload_s - rates * problem.upload_saved_s) / left_s
    return rates if needed.sum() <= 1.0 else None


def _within_mean(problem: PruningProblem, rates: Float64Array) -> Float64Array:
    """Take off what rounding has put above the mean."""
    mean = float(rates @ problem.budget)
    return rates if mean <= problem.mean_rate else rates * (problem.mean_rate / mean)
