"""The devices of a large fleet that dual ascent (`jbba`) has not looked at."""

from __future__ import annotations

from bisect import bisect_right

import numpy as np

from lola_flwr.allocation.edges import edges_of
from lola_flwr.allocation.problem import AllocationProblem
from lola_flwr.allocation.shortlist import cheapest_rows, steps
from lola_flwr.arrays import BoolArray, Float64Array, IntArray


class Outsiders:
    """The devices that no step has looked at: what they would cost, at least.

    They all have the same multiplier, so per unit of it an edge costs ``c + b r``, with
    r the root of the upload time and one price b for all. The least of them is concave
    in b and rises: between two values of b it is no less than on the line from one to
    the other, nor than at the lower one.

    Parameters
    ----------
    problem
        The instance.
    """

    def __init__(self, problem: AllocationProblem) -> None:
        self.problem = problem
        self._edges = edges_of(problem)
        self._is_near: BoolArray = np.zeros(problem.num_devices, dtype=np.bool_)
        self._upload_s = one_for_all(self._edges.full_band_upload_s)
        self._root = np.asfortranarray(np.sqrt(self._upload_s))
        self._deadline_s = np.inf
        # Infinite where cut, and where near; column by column, which is faster.
        self._compute_s = np.empty_like(self._edges.compute_s, order="F")
        self._prices: list[float] = []
        self._least: list[Float64Array] = []

    def are_dearer(self, cost: Float64Array, price: float) -> bool:
        """Tell whether none can be cheaper than that in some block, shape (n,)."""
        place = bisect_right(self._prices, price)
        below, least = (
            (self._prices[place - 1], self._least[place - 1])
            if place
            else (0.0, np.zeros_like(cost))
        )
        if place < len(self._prices):
            part = (price - below) / (self._prices[place] - below)
            line = (1 - part) * least + part * self._least[place]
            least = np.maximum(least, line)
        return bool((cost <= least).all())

    def cheapest(self, price: float, deadline_s: float) -> IntArray:
        """Return who is near, with as many more for each block as may matter."""
        if deadline_s < self._deadline_s:
            self._deadline_s = deadline_s
            for rows in steps(self.problem.num_devices):
                self._compute_s[rows] = in_time(
                    self._edges.compute_s[rows], self._upload_s[rows], deadline_s
                )
            self._compute_s[self._is_near] = np.inf
        slots = int(self._edges.demand.sum())
        devices, least = cheapest_rows(
            lambda rows: self._compute_s[rows] + price * self._root[rows],
            self.problem.num_devices,
            max(slots, int(self._is_near.sum()) // 2),
        )
        self._is_near[devices] = True
        self._compute_s[devices] = np.inf
        place = bisect_right(self._prices, price)
        self._prices.insert(place, price)
        self._least.insert(place, least)
        return np.flatnonzero(self._is_near)


def in_time(
    compute_s: Float64Array, upload_s: Float64Array, deadline_s: float
) -> Float64Array:
    """Return times that are infinite where a pair is in no better round: the cutting.

    It is too slow even with the whole band. So either the incumbent is optimal, or the
    optimum is a matching of what is left: the bound holds up to the incumbent. A pair
    that would beat it by no more than rounding is cut, too.
    """
    late = compute_s + upload_s >= deadline_s * (1.0 - 1e-12)
    return np.where(late, np.inf, compute_s)


def one_for_all(upload_s: Float64Array) -> Float64Array:
    """Return one column where all are alike, as where all blocks have one payload."""
    is_uniform = bool((upload_s == upload_s[:, :1]).all())
    return upload_s[:, :1] if is_uniform else upload_s
