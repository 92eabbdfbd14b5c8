"""Fewer devices than blocks: which device trains which consecutive blocks.

A device that is given several blocks passes once from the loss down to the deepest of
them, and uploads the gradients of all. The round's n blocks are cut into K *spans* of
consecutive blocks, one for every device, and what is sought is the cut and the matching
of the least round latency under their best shares: one problem. (With no device left
idle: alone, the one with the best channel would mostly be done first, and a model learn
from nobody else's data. A device is idle only where no cut has blocks for it that it
can hold.)

For a deadline T, device k needs the share ``w = tau / (T - c)`` for the blocks from a
to b, and T can be met if and only if the cheapest cover of the blocks by spans of
different devices needs at most the whole band. As in `lola_flwr.allocation.exact`, all
w fall as T grows, so from any cover's own best deadline either the cheapest cover has a
smaller one, or that deadline is the optimum.

The cheapest cover is a dynamic program over the blocks covered so far and the devices
used for them, of K n^2 2^K steps: exact, and quick for up to `_MOST_EXACT` devices.
With more of them, that each device has just one span is relaxed: devices get prices,
the cheapest cover under prices is a shortest path over the blocks, and its spans are
matched to devices. A linear program gives the bound that the best prices would, which
tells how far from the optimum the best cover found can be. Prices say nothing of covers
that leave blocks or devices out: where they find no other, an integer program does; few
pairs are possible then, and it takes some hundredths of a second.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from lola_flwr.allocation.band import least_share, upload_s
from lola_flwr.allocation.problem import IMPOSSIBLE_S
from lola_flwr.allocation.shares import best_deadline
from lola_flwr.allocation.span_program import cheapest_cover, least_band
from lola_flwr.arrays import BoolArray, Float64Array, IntArray

# Each device more doubles the table: with 10 and 24 blocks a cover takes 20 ms.
_MOST_EXACT = 10

# Steps of the prices, and of those without a better bound until they become smaller.
_MOST_STEPS = 400
_PATIENCE = 10

# How long covers that leave something out are looked for, seconds.
_TIME_LIMIT_S = 1.0


class Span(NamedTuple):
    """Consecutive blocks of the round, and who trains them."""

    device: int
    first: int
    last: int

    @property
    def blocks(self) -> range:
        """The blocks, numbered as the round's."""
        return range(self.first, self.last + 1)


@dataclass(frozen=True, eq=False, kw_only=True)
class SpanProblem:
    """What every device would take for every span of a round's n blocks.

    Parameters
    ----------
    compute_s
        Seconds that each device computes for the blocks from a to b, shape [K, n, n];
        read where ``a <= b``.
    full_band_upload_s
        Seconds that it uploads over the whole band, shape [K, n, n].
    feasible
        Whether it can, shape [K, n, n].
    worth
        What each block is worth where not all can be covered, whole numbers from 1 on,
        shape [n].
    snr
        Full-band SNR of each device if power-limited, shape [K].
    """

    compute_s: Float64Array
    full_band_upload_s: Float64Array
    feasible: BoolArray
    worth: Float64Array
    snr: Float64Array | None = None
    possible: BoolArray = field(init=False)

    def __post_init__(self) -> None:
        """Find the pairs of device and span that are possible."""
        finite = np.maximum(self.compute_s, self.full_band_upload_s) < IMPOSSIBLE_S
        object.__setattr__(self, "possible", np.triu(self.feasible & finite))

    def cost(self, deadline_s: float) -> Float64Array:
        """Share that each pair needs, capped at 1; infinite where impossible."""
        time_s = np.where(self.possible, deadline_s - self.compute_s, 0.0)
        upload = np.where(self.possible, self.full_band_upload_s, 0.0)
        share = least_share(upload, time_s, self._snr)
        return np.where(self.possible, share, np.inf)

    def relative_latency(self) -> Float64Array:
        """Latency of each pair at equal shares, that of all devices at most 1 in sum.

        A cost to begin with: a cover of short latencies is near the best.
        """
        num_devices = len(self.compute_s)
        seconds: Float64Array = np.where(self.possible, self.compute_s, np.inf)
        upload = np.where(self.possible, self.full_band_upload_s, 0.0)
        seconds += upload_s(upload, 1.0 / num_devices, self._snr)
        longest_s = np.max(seconds, where=self.possible, initial=np.finfo(float).tiny)
        return seconds / longest_s / num_devices

    def of(self, devices: IntArray) -> SpanProblem:
        """Return the problem for some devices."""
        return SpanProblem(
            compute_s=self.compute_s[devices],
            full_band_upload_s=self.full_band_upload_s[devices],
            feasible=self.feasible[devices],
            worth=self.worth,
            snr=None if self.snr is None else self.snr[devices],
        )

    def deadline_s(self, spans: Sequence[Span]) -> float:
        """Return when these devices can be done, each with its span."""
        index = tuple(np.array(spans).T)
        snr = None if self.snr is None else self.snr[index[0]]
        return best_deadline(self.compute_s[index], self.full_band_upload_s[index], snr)

    def rank(self, spans: Sequence[Span]) -> tuple[float, int, float]:
        """Return what of two covers the better one has more of."""
        worth = sum(self.worth[list(span.blocks)].sum() for span in spans)
        return worth, len(spans), -self.deadline_s(spans)

    @property
    def _snr(self) -> Float64Array | None:
        return None if self.snr is None else self.snr[:, None, None]


@dataclass(frozen=True, kw_only=True)
class SpanCover:
    """Which device trains which blocks.

    Parameters
    ----------
    spans
        From the first block on.
    is_whole
        Whether every block is covered.
    deadline_s
        When the last device can be done.
    bound_s
        No cover that is worth as much can be done earlier: ``deadline_s`` itself where
        the cover is the best one for certain.
    iterations
        Covers that were looked for.
    """

    spans: tuple[Span, ...]
    is_whole: bool
    deadline_s: float
    bound_s: float
    iterations: int


def solve_spans(problem: SpanProblem) -> SpanCover | None:
    """Cover a round's blocks by devices' spans, so that the round ends earliest.

    Where they cannot all be covered, it is the blocks that are worth most. Of these
    covers it is one with most devices, and of those the earliest. None if no block can
    be covered.
    """
    able = np.flatnonzero(problem.possible.any(axis=(1, 2)))
    if not able.size:
        return None
    problem = problem.of(able)
    if able.size <= _MOST_EXACT:
        spans, bound, iterations = _by_subsets(problem)
    else:
        spans, bound, iterations = _by_prices(problem)
        if problem.rank(spans)[:2] < (problem.worth.sum(), able.size):
            spans, bound, more = _by_program(problem, spans)
            iterations += more
    deadline_s = problem.deadline_s(spans)
    return SpanCover(
        spans=tuple(span._replace(device=int(able[span.device])) for span in spans),
        is_whole=sum(len(span.blocks) for span in spans) == len(problem.worth),
        deadline_s=deadline_s,
        # A cover that needs the share w of the band for T needs at least w T / T' for
        # an earlier T': shares are convex functions of the rate, and 0 at rate 0.
        bound_s=deadline_s * bound,
        iterations=iterations,
    )


Solved = tuple[list[Span], float, int]


def _by_subsets(problem: SpanProblem) -> Solved:
    """Solve exactly: from cover to cheapest cover at its deadline."""
    best: list[Span] = []
    deadline_s, iterations = np.inf, 0
    cost = problem.relative_latency()
    while True:
        found = _Table(cost, problem.worth).spans()
        iterations += 1
        earlier_s = problem.deadline_s(found)
        if not earlier_s < deadline_s:
            break
        best, deadline_s = found, earlier_s
        cost = problem.cost(deadline_s)
    return best, 1.0, iterations


class _Table:
    """Least cost of covering the first blocks with each set of devices.

    Parameters
    ----------
    cost
        Of each device and span, [K, n, n].
    worth
        Of each block, [n], where some have to be left out.
    """

    def __init__(self, cost: Float64Array, worth: Float64Array) -> None:
        num_devices, num_blocks = cost.shape[:2]
        # No band is worth a block: shares are at most 1.
        price = num_devices + 1.0
        self._num_blocks = num_blocks
        least = np.full((num_blocks + 1, 1 << num_devices), np.inf)
        least[0, 0] = 0.0
        # How a cell was reached: by a device, from where; -1: a block was left out.
        device, start = np.zeros((2, *least.shape), np.int16)
        for first in range(num_blocks):
            for k in range(num_devices):
                # Sets without device k and with it, as views: [..., without or with, :]
                halves = (num_blocks + 1, -1, 2, 1 << k)
                before = least.reshape(halves)[first, :, 0, :]
                behind = (slice(first + 1, None), slice(None), 1)
                now = least.reshape(halves)[behind]
                through = before + cost[k, first, first:, None, None]
                better = through < now
                np.copyto(now, through, where=better)
                np.copyto(device.reshape(halves)[behind], k, where=better)
                np.copyto(start.reshape(halves)[behind], first, where=better)
            without = least[first] + worth[first] * price
            better = without < least[first + 1]
            least[first + 1, better] = without[better]
            device[first + 1, better] = -1
        self._device, self._start = device, start
        # Of what is covered most, that by most devices, and of that the cheapest.
        lost = np.floor(least[-1] / price)
        sets = np.arange(1 << num_devices)
        used = sum((sets >> k) & 1 for k in range(num_devices))
        used = np.where(lost == lost.min(), used, -1)
        most = np.where(used == used.max(), least[-1], np.inf)
        self._set = int(most.argmin())

    def spans(self) -> list[Span]:
        """Return the spans of the cheapest cover, from the first block on."""
        found, end, used = [], self._num_blocks, self._set
        while end:
            k = int(self._device[end, used])
            if k < 0:
                end -= 1
                continue
            start = int(self._start[end, used])
            found.append(Span(k, start, end - 1))
            end, used = start, used ^ (1 << k)
        return found[::-1]


def _by_prices(problem: SpanProblem) -> Solved:
    """Solve nearly, by the ascent of Lagrangian prices on the devices.

    Polyak's steps: what the cheapest cover costs is at most 1 at a deadline that can be
    met, so that the way to there is known.
    """
    num_devices = len(problem.compute_s)
    best: list[Span] = []
    rank = (0.0, 0, -np.inf)
    cost = problem.relative_latency()
    prices, highest, pace, waited = np.zeros(num_devices), 0.0, 1.0, 0
    iterations = 0
    while iterations < _MOST_STEPS:
        iterations += 1
        priced = cost + prices[:, None, None]
        path, least = _cheapest_path(priced.min(axis=0), problem.worth, num_devices)
        spans = _matched(problem, cost, path)
        found = problem.rank(spans)
        if found > rank:
            best, rank = spans, found
            cost, highest, pace, waited = problem.cost(-rank[2]), 0.0, 1.0, 0
            continue
        dual = least - prices.sum()
        waited = 0 if dual > highest else waited + 1
        highest = max(highest, dual)
        if highest >= 1.0:
            break
        if waited == _PATIENCE:
            pace, waited = pace / 2, 0
        first, last = np.array(path).T
        owners = priced[:, first, last].argmin(axis=0)
        excess = np.bincount(owners, minlength=num_devices) - 1.0
        if not excess.any():
            break
        step = pace * (1.0 - dual) / (excess @ excess)
        prices = prices + step * excess
    # Nothing is known of covers that leave blocks or devices out.
    is_whole = rank[:2] == (problem.worth.sum(), num_devices)
    return best, least_band(cost) if is_whole else 0.0, iterations


def _by_program(problem: SpanProblem, best: list[Span]) -> Solved:
    """Solve as `_by_subsets`, by integer programs; give up ``best`` only for better."""
    started, iterations = time.perf_counter(), 0
    rank, cost = problem.rank(best), problem.relative_latency()
    while True:
        left_s = _TIME_LIMIT_S - (time.perf_counter() - started)
        pairs, is_best = cheapest_cover(cost, problem.worth, max(left_s, 0.0))
        iterations += 1
        spans = [Span(*pair) for pair in pairs]
        if spans and problem.rank(spans) > rank:
            best, rank = spans, problem.rank(spans)
        elif iterations > 1:
            return best, float(is_best), iterations
        if not is_best:
            return best, 0.0, iterations
        cost = problem.cost(-rank[2])


def _cheapest_path(
    cost: Float64Array, worth: Float64Array, num_spans: int
) -> tuple[list[tuple[int, int]], float]:
    """Cut blocks into spans of the least total cost, [n, n]; return them and the cost.

    Blocks that no span can hold are left out; and there are fewer spans where so many
    cannot be.
    """
    num_blocks = len(worth)
    price = 1.0 + np.abs(np.where(cost < np.inf, cost, 0.0)).max(axis=1).sum()
    skipped = np.concatenate([[0.0], np.cumsum(worth * price)])  # before each block
    # From the end of one span to that of the next: what is between may be left out.
    ways = skipped[:-1, None] + cost
    nearest = np.minimum.accumulate(ways[::-1])[::-1] - skipped[:-1, None]
    least = np.full((num_spans + 1, num_blocks + 1), np.inf)
    least[0, 0] = 0.0
    ends = np.zeros(least.shape, np.int64)  # of the span before
    for count in range(1, num_spans + 1):
        through = least[count - 1, :-1, None] + nearest
        ends[count, 1:] = through.argmin(axis=0)
        least[count, 1:] = through.min(axis=0)
    total = least + (skipped[-1] - skipped)
    count = int(np.flatnonzero(np.isfinite(total).any(axis=1))[-1])
    end = int(total[count].argmin())
    cheapest, path = float(total[count, end]), []
    for number in range(count, 0, -1):
        before = int(ends[number, end])
        path.append((before + int(ways[before:end, end - 1].argmin()), end - 1))
        end = before
    return path[::-1], cheapest


def _matched(
    problem: SpanProblem, cost: Float64Array, path: Sequence[tuple[int, int]]
) -> list[Span]:
    """Give spans to devices at the least cost; leave those out that are worth least."""
    from scipy.optimize import linear_sum_assignment

    first, last = np.array(path).T
    paid = cost[:, first, last]  # [K, spans]
    worth = np.array([problem.worth[a : b + 1].sum() for a, b in path])
    price = 1.0 + np.sum(np.max(paid, axis=0, where=paid < np.inf, initial=0.0))
    gain = np.where(paid < np.inf, worth / worth.min() * price - paid, 0.0)
    pairs = np.array(linear_sum_assignment(gain, maximize=True)).T.tolist()
    return sorted(
        (Span(k, *path[n]) for k, n in pairs if paid[k, n] < np.inf),
        key=lambda span: span.first,
    )
