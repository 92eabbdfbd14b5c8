"""How many examples each device trains on: the most progress a second.

The gradient of B examples has the share ``B / (B + S)`` of the signal in its square,
where S is its noise scale (McCandlish, Kaplan, Amodei et al., arXiv:1812.06162). With
the learning rate that is best for each batch a step brings as much of what one without
noise would. An optimizer that divides by the root of that square, such as AdamW, and
keeps its learning rate, makes steps that are as long whatever the noise, of which the
root of the share leads on; but what leads nowhere also keeps it from where it is going
to, the more the nearer it is. Between both, the power 3/4 was measured to be best. What
a round brings is the mean of that over the model's blocks. The time to a target falls
as what all rounds bring over the time that they all take, the *pace*, rises. That is
not the sum of each round's own best: where links differ from round to round, a second
is worth what it brings in the others. That round is best whose progress less the pace
times its latency is largest (the renewal-reward theorem; Dinkelbach, Management Science
13, 1967): a bad one is short, and the next comes sooner.

With the matching given, a device that computes ``c + a B`` and uploads for ``tau`` over
the whole band needs the share ``tau / (T - c - a B)`` of it for a round of T seconds.
That is convex in B and T together, and the progress is concave in B: the best progress
P(T) is concave, its gain over the pace has one maximum, and a multiplier of the band's
constraint bounds it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lola_flwr.allocation.shares import best_deadline
from lola_flwr.arrays import Float64Array, IntArray

# Power of the signal's share that a step brings.
_EXPONENT = 0.75
# Lengths of a round that are looked at together, and how often their range narrows. At
# its maximum the gain is flat: the error of the length counts by its square.
_LENGTHS, _NARROWINGS = 12, 4
_BISECTIONS = 20
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
    pace
        Progress that a second brings in other rounds.
    """

    fixed_s: Float64Array
    example_s: Float64Array
    full_band_upload_s: Float64Array
    noise_scale: Float64Array
    weight: Float64Array
    least: IntArray
    most: IntArray
    constant_s: float = 0.0
    pace: float = 0.0

    def compute_s(self, batch_size: IntArray) -> Float64Array:
        """Return the time that each device computes, shape (A,)."""
        return np.asarray(self.fixed_s + self.example_s * batch_size)

    def round_s(self, batch_size: IntArray) -> float:
        """Return the latency of the round at its best shares."""
        compute_s = self.compute_s(batch_size)
        return self.constant_s + best_deadline(compute_s, self.full_band_upload_s)

    def progress(self, batch_size: Float64Array | IntArray) -> Float64Array:
        """Return what the round brings, of batches ``[..., A]``."""
        brought = self.weight * progress(batch_size, self.noise_scale)
        return np.asarray(brought.sum(axis=-1))

    def gain(self, batch_size: IntArray) -> float:
        """Return what the round brings more than other rounds in the same time."""
        return float(self.progress(batch_size)) - self.pace * self.round_s(batch_size)


@dataclass(frozen=True, eq=False)
class OwnBatches:
    """The best batches that were found, and how good any could be.

    Parameters
    ----------
    batch_size
        Examples of each device, shape (A,).
    gain
        What the round brings with them, less the pace times its latency.
    bound
        No batches whatever, whole or not, have a higher gain: proven.
    """

    batch_size: IntArray
    gain: float
    bound: float


def own_batches(problem: BatchProblem) -> OwnBatches:
    """Give each device the batch with which the round brings most for its time.

    Parameters
    ----------
    problem
        The devices, at uniform power per sub-carrier.

    Notes
    -----
    For a length T and a multiplier of the band's constraint the best batches are a
    formula. The multiplier is bisected for several lengths at once, and the range of
    lengths narrowed around the best. What comes out is rounded, and then improved by an
    example at a time. The bound holds whatever the search has found: for any multiplier
    m >= 0 the progress of a round of T is at most
    ``D(T) = m + sum max_B (w (B / (B + S))^p - m tau / (T - c - a B))``, and as D is
    concave, at most what its tangent in any length says.
    """
    shortest_s = problem.round_s(problem.least) - problem.constant_s
    longest_s = max(problem.round_s(problem.most) - problem.constant_s, shortest_s)
    low_s, high_s = shortest_s, longest_s
    tangents = []
    for _ in range(_NARROWINGS):
        lengths_s = np.geomspace(low_s, high_s, _LENGTHS) if low_s else np.zeros(1)
        multiplier = _multipliers(problem, lengths_s)
        batch = _lagrangian_batches(problem, lengths_s, multiplier)
        tangents.append(_tangents(problem, lengths_s, multiplier, batch))
        best = int((problem.progress(batch) - problem.pace * lengths_s).argmax())
        low_s = float(lengths_s[max(best - 1, 0)])
        high_s = float(lengths_s[min(best + 1, lengths_s.size - 1)])
    # Between the devices' bounds every whole number is within them, too.
    rounded = [np.floor(batch[best] + 1e-9), np.rint(batch[best])]
    found = max((each.astype(np.int64) for each in rounded), key=problem.gain)
    found = _improved(problem, np.clip(found, problem.least, problem.most))
    gain = problem.gain(found)
    bound = _highest(np.hstack(tangents), problem.pace, (shortest_s, longest_s))
    bound -= problem.pace * problem.constant_s
    return OwnBatches(found, gain, max(bound, gain))


def _multipliers(problem: BatchProblem, lengths_s: Float64Array) -> Float64Array:
    """Return the multipliers at which rounds of some lengths need the whole band."""
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
    return np.asarray(np.exp(high))


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
    best, gain = batch_size, problem.gain(batch_size)
    for _ in range(_MOST_PASSES):
        before = gain
        for device in range(best.size):
            for step in (1, -1):
                other = best.copy()
                other[device] += step
                if not problem.least[device] <= other[device] <= problem.most[device]:
                    continue
                if (found := problem.gain(other)) > gain:
                    best, gain = other, found
                    break
        if gain <= before:
            break
    return best


def _tangents(
    problem: BatchProblem,
    lengths_s: Float64Array,
    multiplier: Float64Array,
    batch_size: Float64Array,
) -> Float64Array:
    """Return lines that no round's progress is above: at 0 s, and a second, [2, T].

    What is maximised is concave in batches and length together: at any batches, best or
    not, it is below its tangent, whose most is at an end of each batch's bounds. Who
    uploads nothing has the batch that there is time for.
    """
    share = _shares(problem, lengths_s, batch_size)
    example_s, uploads = problem.example_s, problem.full_band_upload_s > 0.0
    left_s = lengths_s[:, None] - problem.fixed_s - example_s * batch_size
    steepness = problem.weight * problem.noise_scale * _EXPONENT
    with np.errstate(divide="ignore", invalid="ignore"):
        rise = steepness * batch_size ** (_EXPONENT - 1.0)
        rise /= (batch_size + problem.noise_scale) ** (_EXPONENT + 1.0)
        later = np.where(uploads, multiplier[:, None] * share / left_s, 0.0)
        more = np.where(uploads, rise - later * example_s, 0.0)
        waits = ~uploads & (batch_size < problem.most) & (example_s > 0.0)
        slope = (later + np.where(waits, rise / example_s, 0.0)).sum(axis=1)
        ends = [more * (end - batch_size) for end in (problem.least, problem.most)]
        dual = problem.progress(batch_size) + multiplier * (1.0 - share.sum(axis=1))
        dual += np.maximum(*ends).sum(axis=1)
        lines = np.array([dual - slope * lengths_s, slope])
    return lines[:, np.isfinite(lines).all(axis=0)]


def _highest(lines: Float64Array, pace: float, all_s: tuple[float, float]) -> float:
    """Return the most that a length has below all lines, less the pace times it."""
    at_zero, slope = lines
    with np.errstate(divide="ignore", invalid="ignore"):
        # Where two meet, or at an end.
        meet_s = -np.subtract.outer(at_zero, at_zero) / np.subtract.outer(slope, slope)
    lengths_s = np.clip(np.append(meet_s[np.isfinite(meet_s)], all_s), *all_s)
    below = (at_zero[:, None] + slope[:, None] * lengths_s).min(axis=0, initial=np.inf)
    return float((below - pace * lengths_s).max())


class Candidate(NamedTuple):
    """A common batch, the index of a codec, and the progress a second they bring."""

    batch_size: int
    level: int
    rate: float


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


def best_candidate(
    batch_sizes: Sequence[int],
    errors: Sequence[float],
    attempt: Callable[[int, int], Tried | None],
    *,
    pace: float | None = None,
    finer_is_longer: bool = True,
) -> Candidate | None:
    """Return the common batch and the codec with which a round brings most.

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
    pace
        Progress that a second brings in other rounds; None: there were none, and the
        round with most progress a second is best.
    finer_is_longer
        Whether with a finer codec no round is shorter: what cannot win then is not
        solved.

    Returns
    -------
    The best one; exact if what is attempted is. None if no candidate has a round.
    """

    def worth(brought: float, round_s: float) -> float:
        return brought / round_s if pace is None else brought - pace * round_s

    best: Candidate | None = None
    highest = -np.inf
    # Of each batch: its progress, and a latency that no finer codec has less than.
    known: dict[int, tuple[float, float] | None] = {}
    for level, error in enumerate(errors):
        left = (1.0 + error) ** -_EXPONENT
        for batch_size in batch_sizes:
            before = known.get(batch_size, (np.inf, 1.0))
            if before is None or worth(before[0] * left, before[1]) <= highest:
                continue
            tried = attempt(batch_size, level)
            if tried is None:
                known[batch_size] = None
                continue
            brought = tried.progress * left
            if best is None or worth(brought, tried.round_s) > highest:
                highest = worth(brought, tried.round_s)
                best = Candidate(batch_size, level, brought / tried.round_s)
            if finer_is_longer and tried.bound_s > 0.0:
                known[batch_size] = (tried.progress, tried.bound_s)
    return best
