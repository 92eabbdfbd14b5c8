"""How many examples each device trains on: the most progress a second.

The gradient of B examples has the share ``B / (B + S)`` of the signal in its square,
where S is its noise scale (McCandlish, Kaplan, Amodei et al., arXiv:1812.06162). With
the learning rate that is best for each batch a step brings as much of what one without
noise would. An optimizer that divides by the root of that square, such as AdamW, and
keeps its learning rate, brings the root of it: a step is as long whatever the noise,
and noise takes a part of it that goes nowhere. What a round brings is the mean of that
over the model's blocks, and the time to a target falls as that over the round's
latency, its rate, rises.

With the matching given, a device that computes ``c + a B`` and uploads for ``tau`` over
the whole band needs the share ``tau / (T - c - a B)`` of it for a round of T seconds.
That is convex in B and T together, and the progress is concave in B: the best progress
P(T) is concave, its rate has one maximum, and a multiplier of the band's constraint
bounds it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lola_flwr.allocation.shares import best_deadline
from lola_flwr.arrays import Float64Array, IntArray

# Power of the signal's share that a step brings.
_EXPONENT = 0.5
# Lengths of a round that are looked at together, and how often their range narrows. At
# its maximum the rate is flat: the error of the length counts by its square.
_LENGTHS, _NARROWINGS = 12, 4
_BISECTIONS = 28
# Newton's steps to the best batch for a multiplier, and how far one may lead (log).
_STEPS, _LONGEST_STEP = 9, 5.0
# Of a sum of shares: in the shortest round there is no room to err.
_ROUNDING = 1e-9
# Passes over the devices that try one example more or less than what was rounded.
_MOST_PASSES = 4


def progress(
    batch_size: Float64Array | IntArray, noise_scale: Float64Array
) -> Float64Array:
    """Return what steps bring, of what they would without noise."""
    return np.asarray((batch_size / (batch_size + noise_scale)) ** _EXPONENT)


@dataclass(frozen=True, eq=False, kw_only=True)
class BatchProblem:
    """How much more each device may do in a round whose matching is given.

    Parameters
    ----------
    fixed_s
        Time that each device takes whatever its batch, seconds, shape (A,).
    example_s
        Time that it computes for each example, seconds, shape (A,).
    full_band_upload_s
        Upload time over the whole band, seconds, shape (A,).
    noise_scale
        Noise scale of the gradient of each device's block, examples, shape (A,).
    weight
        What a step of that block brings without noise, shape (A,).
    least, most
        Bounds of each device's batch, whole examples, shape (A,); at least 1.
    constant_s
        Time that every round takes besides, seconds.
    """

    fixed_s: Float64Array
    example_s: Float64Array
    full_band_upload_s: Float64Array
    noise_scale: Float64Array
    weight: Float64Array
    least: IntArray
    most: IntArray
    constant_s: float = 0.0

    def compute_s(self, batch_size: IntArray) -> Float64Array:
        """Return the time that each device computes, shape (A,)."""
        return np.asarray(self.fixed_s + self.example_s * batch_size)

    def round_s(self, batch_size: IntArray) -> float:
        """Return the latency of the round at its best shares."""
        compute_s = self.compute_s(batch_size)
        return self.constant_s + best_deadline(compute_s, self.full_band_upload_s)

    def rate(self, batch_size: IntArray) -> float:
        """Return the round's progress a second at its best shares."""
        brought = self.weight * progress(batch_size, self.noise_scale)
        return float(brought.sum()) / self.round_s(batch_size)


@dataclass(frozen=True, eq=False)
class OwnBatches:
    """The best batches that were found, and how good any could be.

    Parameters
    ----------
    batch_size
        Examples of each device, shape (A,).
    rate
        The round's progress a second with them.
    bound
        No batches whatever, whole or not, have a higher rate: proven.
    """

    batch_size: IntArray
    rate: float
    bound: float

    @property
    def gap(self) -> float:
        """How far the rate can be from the best one, relative."""
        return self.bound / self.rate - 1.0


def own_batches(problem: BatchProblem) -> OwnBatches:
    """Give each device the batch with which the round brings most progress a second.

    Parameters
    ----------
    problem
        The devices, at uniform power per sub-carrier.

    Notes
    -----
    For a length T and a multiplier of the band's constraint the best batches are a
    formula. The multiplier is bisected for several lengths at once, and the range of
    lengths narrowed around the best. What comes out is rounded, and then improved by an
    example at a time. The bound holds whatever the search has found: it is the dual
    function, and its tangent in T.
    """
    shortest_s = problem.round_s(problem.least) - problem.constant_s
    longest_s = problem.round_s(problem.most) - problem.constant_s
    low_s, high_s = shortest_s, max(longest_s, shortest_s)
    for _ in range(_NARROWINGS):
        lengths_s = np.linspace(low_s, high_s, _LENGTHS)
        batch = _best_at(problem, lengths_s)
        brought = (problem.weight * progress(batch, problem.noise_scale)).sum(axis=1)
        best = int((brought / (lengths_s + problem.constant_s)).argmax())
        low_s = float(lengths_s[max(best - 1, 0)])
        high_s = float(lengths_s[min(best + 1, _LENGTHS - 1)])
    # Between the devices' bounds every whole number is within them, too.
    rounded = [np.floor(batch[best] + 1e-9), np.rint(batch[best])]
    found = max((each.astype(np.int64) for each in rounded), key=problem.rate)
    found = _improved(problem, np.clip(found, problem.least, problem.most))
    rate = problem.rate(found)
    bound = _bound(problem, (low_s, high_s), shortest_s)
    return OwnBatches(found, rate, max(bound, rate))


def _best_at(problem: BatchProblem, lengths_s: Float64Array) -> Float64Array:
    """Return the best batches of rounds of some lengths, [T, A]."""
    # The multiplier that brings every batch to its least is not above this.
    slopes = problem.weight * problem.noise_scale * _EXPONENT
    slopes /= problem.least ** (1.0 - _EXPONENT)
    steepest = (slopes / (problem.least + problem.noise_scale) ** (1 + _EXPONENT)).max()
    left_s = lengths_s[:, None] - problem.compute_s(problem.least)
    with np.errstate(divide="ignore", invalid="ignore"):
        per_example = problem.full_band_upload_s * problem.example_s / left_s**2
    flattest = np.nanmin(np.where(per_example > 0, per_example, np.nan), initial=1.0)
    low = np.full(lengths_s.size, np.log(1e-18))
    high = np.full(lengths_s.size, np.log(max(steepest / max(flattest, 1e-18), 1e-12)))
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        batch = _lagrangian_batches(problem, lengths_s, np.exp(middle))
        fits = _shares(problem, lengths_s, batch).sum(axis=1) <= 1.0 + _ROUNDING
        high, low = np.where(fits, middle, high), np.where(fits, low, middle)
    return _lagrangian_batches(problem, lengths_s, np.exp(high))


def _lagrangian_batches(
    problem: BatchProblem, lengths_s: Float64Array, multiplier: Float64Array
) -> Float64Array:
    """Return the batches that bring most less what their band costs, [T, A].

    There the derivatives of both are equal, ``w p S B^(p-1) / (B + S)^(p+1)`` and
    ``m tau a / (T - c - a B)^2``. With p = 1 their roots are linear in B, which tells
    where to begin. The logarithm of their ratio is a concave function of log B, and
    falls: from its right Newton's method comes down to the zero, and from anywhere it
    is on its right after a step, unless that leads past what there is time for.
    """
    left_s = lengths_s[:, None] - problem.fixed_s
    example_s, scale = problem.example_s, problem.noise_scale
    gain = problem.weight * scale * _EXPONENT
    cost = multiplier[:, None] * problem.full_band_upload_s * example_s
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        longest = left_s / example_s
        batch = (left_s * np.sqrt(gain) - scale * np.sqrt(cost)) / (
            example_s * np.sqrt(gain) + np.sqrt(cost)
        )
        log_gain, log_cost = np.log(gain), np.log(cost)
        several = (gain > 0.0) & (cost > 0.0)
        batch = np.where(several, np.clip(batch, 1e-3, 0.5 * longest), batch)
        for _ in range(_STEPS):
            rest_s = left_s - example_s * batch
            ratio = log_gain - log_cost + 2.0 * np.log(rest_s)
            ratio += (_EXPONENT - 1.0) * np.log(batch)
            ratio -= (_EXPONENT + 1.0) * np.log(batch + scale)
            slope = (_EXPONENT - 1.0) - (_EXPONENT + 1.0) * batch / (batch + scale)
            slope = slope - 2.0 * example_s * batch / rest_s
            # A step may lead past what there is time for: half of the way, then.
            nearer = batch * np.exp(np.minimum(-ratio / slope, _LONGEST_STEP))
            nearer = np.minimum(nearer, 0.5 * (batch + longest))
            batch = np.where(several & np.isfinite(nearer), nearer, batch)
    # Where neither counts, examples bring nothing and cost nothing.
    batch = np.where(np.isnan(batch), problem.least, batch)
    return np.clip(batch, problem.least, problem.most)


def _shares(
    problem: BatchProblem, lengths_s: Float64Array, batch_size: Float64Array
) -> Float64Array:
    """Return the shares that rounds of some lengths need, [T, A]."""
    left_s = lengths_s[:, None] - problem.fixed_s - problem.example_s * batch_size
    with np.errstate(divide="ignore", invalid="ignore"):
        share = problem.full_band_upload_s / left_s
    nothing = problem.full_band_upload_s == 0.0
    late = left_s < -1e-9 * lengths_s[:, None]
    share = np.where(nothing, np.where(late, np.inf, 0.0), share)
    return np.where((left_s <= 0.0) & ~nothing, np.inf, share)


def _improved(problem: BatchProblem, batch_size: IntArray) -> IntArray:
    """Return batches that no device's one example more or less makes better."""
    best, rate = batch_size, problem.rate(batch_size)
    for _ in range(_MOST_PASSES):
        before = rate
        for device in range(best.size):
            for step in (1, -1):
                other = best.copy()
                other[device] += step
                if not problem.least[device] <= other[device] <= problem.most[device]:
                    continue
                if (found := problem.rate(other)) > rate:
                    best, rate = other, found
                    break
        if rate <= before:
            break
    return best


def _bound(
    problem: BatchProblem, range_s: tuple[float, float], shortest_s: float
) -> float:
    """Return a rate that no batches exceed, by duality.

    For any multiplier m >= 0 the progress of a round of T is at most
    ``D(T) = m + sum max_B (w (B / (B + S))^p - m tau / (T - c - a B))``. D is concave,
    so it lies below its tangent in any length; and that over T has its maximum at an
    end of the range of lengths. The multiplier, and the length in a given range, that
    say most are searched for.
    """
    low, high = np.array([-60.0, range_s[0]]), np.array([20.0, range_s[1]])
    bound = np.inf
    for _ in range(2 * _NARROWINGS):
        logs, lengths_s = np.linspace(low, high, _LENGTHS).T
        each_s, each = np.meshgrid(lengths_s, logs)
        bounds = _bounds_at(problem, each_s.ravel(), shortest_s, np.exp(each.ravel()))
        best = np.array(divmod(int(bounds.argmin()), _LENGTHS))
        bound = min(bound, float(bounds.min()))
        step = (high - low) / (_LENGTHS - 1)
        middle = low + step * best
        low, high = np.maximum(low, middle - step), np.minimum(high, middle + step)
    return bound


def _bounds_at(
    problem: BatchProblem,
    lengths_s: Float64Array,
    shortest_s: float,
    multiplier: Float64Array,
) -> Float64Array:
    """Return the bounds that some lengths and multipliers give, [M]."""
    batch = _lagrangian_batches(problem, lengths_s, multiplier)
    share = _shares(problem, lengths_s, batch)
    left_s = lengths_s[:, None] - problem.fixed_s - problem.example_s * batch
    brought = (problem.weight * progress(batch, problem.noise_scale)).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        slope = multiplier * np.where(share > 0.0, share / left_s, 0.0).sum(axis=1)
        dual = brought + multiplier * (1.0 - share.sum(axis=1))
        rest = dual - slope * (lengths_s + problem.constant_s)
        bound = slope + np.maximum(rest, 0.0) / (shortest_s + problem.constant_s)
    return np.asarray(np.nan_to_num(bound, nan=np.inf, posinf=np.inf))


@dataclass(frozen=True, eq=False, kw_only=True)
class Tried:
    """A candidate's round.

    Parameters
    ----------
    progress
        What it brings.
    round_s
        Its latency.
    bound_s
        Lower bound of the best possible latency; NaN if there is none.
    """

    progress: float
    round_s: float
    bound_s: float

    @property
    def rate(self) -> float:
        """Progress a second."""
        return self.progress / self.round_s


def best_candidate(
    batch_sizes: Sequence[int],
    errors: Sequence[float],
    attempt: Callable[[int, int], Tried | None],
    *,
    finer_is_longer: bool = True,
) -> tuple[int, int] | None:
    """Return the common batch and the codec with which rounds bring most a second.

    Parameters
    ----------
    batch_sizes
        The grid.
    errors
        Of each codec, coarsest first: its squared error, relative to the gradient's
        square. It is noise besides: with it the signal's share is ``1 / (1 + error)``
        of what it was.
    attempt
        Solves the round of a batch size and the codec of an index, without regard to
        its error; None if there is none.
    finer_is_longer
        Whether with a finer codec no round is shorter: what cannot win then is not
        solved.

    Returns
    -------
    Batch size and index of the codec; exact if what is attempted is. None if no
    candidate has a round.
    """
    best: tuple[float, int, int] | None = None
    # What is known of each batch: no finer codec has a higher rate, but for its error.
    bounds = dict.fromkeys(batch_sizes, np.inf)
    for level, error in enumerate(errors):
        for batch_size in batch_sizes:
            left = (1.0 + error) ** -_EXPONENT
            if best is not None and bounds[batch_size] * left <= best[0]:
                continue
            tried = attempt(batch_size, level)
            if tried is None:
                bounds[batch_size] = 0.0
                continue
            rate = tried.rate * left
            if best is None or rate > best[0]:
                best = (rate, batch_size, level)
            if finer_is_longer and tried.bound_s > 0.0:
                bounds[batch_size] = tried.progress / tried.bound_s
    return None if best is None else best[1:]
