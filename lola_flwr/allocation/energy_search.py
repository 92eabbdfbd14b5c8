"""The matching of least energy in all, by branch and bound on Lagrange's bound.

At a price of the band each pair of device and block has its own best share, and what it
then costs, energy and band, is a number: the cheapest matching's, less the price of the
whole band, is no more than any matching's energy. Where the best of these bounds is
below the best matching found, the matchings are divided by whether they hold one pair,
until no part can hold a better one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from itertools import count

import numpy as np

from lola_flwr.allocation.energy_shares import WHOLE_BAND, least_sum_shares
from lola_flwr.allocation.energy_table import ACCURACY, EnergyTable
from lola_flwr.allocation.matching import Matching, cheapest_matching
from lola_flwr.arrays import BoolArray, Float64Array, IntArray

# Prices that are tried for one part of the matchings: the first, and later ones.
_MOST_PRICES, _FURTHER_PRICES = 40, 8


@dataclass(frozen=True, eq=False)
class _Part:
    """Matchings that hold some pairs and lack others, and what is known of them."""

    forced: tuple[tuple[int, int], ...] = ()
    banned: BoolArray = field(default_factory=lambda: np.zeros((), np.bool_))  # [k, n]
    price: float = 1.0  # where the bound was best
    bound_j: float = -math.inf
    divides_at: tuple[int, int] | None = None


@dataclass(frozen=True, eq=False)
class Found:
    """The best matching found, in the rows and columns of its table.

    Parameters
    ----------
    table
        The pairs that were left in the end.
    matching
        The matching.
    energy_j, bound_j
        What it takes in all, and what any other takes at least, joules: the same where
        it is proven to be the best.
    iterations
        Assignment problems that were solved.
    """

    table: EnergyTable
    matching: Matching
    energy_j: float
    bound_j: float
    iterations: int


def least_energy(table: EnergyTable, max_parts: int) -> Found:
    """Find the matching that takes least energy in all.

    Parameters
    ----------
    table
        What pairs take.
    max_parts
        Largest number of parts that the matchings are divided into.
    """
    first = _Search(table)
    whole = first.bounded(first.whole, _MOST_PRICES)
    if whole is None:
        return first.found(first.energy_j)
    rows, matching = first.rows_that_matter(whole)
    search = _Search(table.of_rows(rows, matching))
    whole = replace(search.whole, price=whole.price, bound_j=whole.bound_j)
    found = search.found(search.run(whole, max_parts))
    return replace(found, iterations=first.iterations + found.iterations)


class _Search:
    """Branch and bound over the matchings of a table, from its shortest round's on."""

    def __init__(self, table: EnergyTable) -> None:
        self.energy_j = math.inf
        self.iterations = 0
        self._matching = table.shortest
        self._table = table
        self._full_band_j = table.full_band_j
        self._possible = np.isfinite(table.least)
        costs = (table.compute_j, self._full_band_j, table.least)
        rows = np.concatenate(costs, axis=1)
        self._alike = np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1)
        _, price = self._consider(table.shortest)
        self.whole = _Part(
            banned=np.zeros_like(self._possible), price=max(price, 1e-300)
        )

    def found(self, bound_j: float) -> Found:
        """Return the best matching, with what is proven of it."""
        return Found(
            self._table, self._matching, self.energy_j, bound_j, self.iterations
        )

    def run(self, whole: _Part, max_parts: int) -> float:
        """Search all matchings; return what none of them takes less than."""
        order = count()
        heap: list[tuple[float, int, _Part]] = []

        def add(part: _Part | None) -> None:
            if part is not None and self._may_be_better(part.bound_j):
                heappush(heap, (part.bound_j, next(order), part))

        add(self.bounded(whole, _FURTHER_PRICES))
        for _ in range(max_parts):
            if not heap or not self._may_be_better(heap[0][0]):
                break
            part = heappop(heap)[2]
            for divided in self._divided(part):
                add(self.bounded(divided, _FURTHER_PRICES))
        is_proven = not heap or not self._may_be_better(heap[0][0])
        return self.energy_j if is_proven else heap[0][0]

    def rows_that_matter(self, whole: _Part) -> tuple[IntArray, Matching]:
        """Return the rows that a better matching may hold, and the best one in them.

        By reduced costs: what a matching that is forced to hold a pair costs more than
        the cheapest one, at the price of the best bound.
        """
        everything = np.arange(len(self._possible))
        if self._table.edges.all_devices:
            return everything, self._matching
        cost, _ = self._cost_at(whole.price)
        found = self._cheapest(whole, cost)
        assert found is not None
        matching, total = found
        cost = np.where(self._possible, cost, np.inf)
        more = _reduced_costs(cost, matching)
        may_be_better = total - whole.price + more < self.energy_j
        may_be_better[self._matching] = True
        rows = np.flatnonzero(may_be_better.any(axis=1))
        held, columns = self._matching
        return rows, (np.searchsorted(rows, held), columns)

    def _may_be_better(self, bound_j: float) -> bool:
        return bound_j < self.energy_j * (1.0 - ACCURACY)

    def _divided(self, part: _Part) -> list[_Part]:
        """Divide a part by whether its matchings hold a pair.

        Devices that are alike can be exchanged for one another: who is to lack the pair
        lacks it with all that are alike and not held elsewhere.
        """
        assert part.divides_at is not None
        row, column = part.divides_at
        alike = self._alike == self._alike[row]
        alike[[held for held, _ in part.forced]] = False
        banned = part.banned.copy()
        banned[alike, column] = True
        return [
            replace(part, forced=(*part.forced, part.divides_at)),
            replace(part, banned=banned),
        ]

    def bounded(self, part: _Part, most_prices: int) -> _Part | None:
        """Return a part with its bound, and where to divide it; None if it is done."""
        needed = self._cheapest(part, np.where(self._possible, self._table.least, 0.0))
        if needed is None or needed[1] > WHOLE_BAND:
            return None
        low, high, price = 0.0, math.inf, part.price
        bound_j, best_price = part.bound_j, part.price
        above: Matching | None = None  # needs more than the band at its price
        below: Matching | None = None
        for _ in range(most_prices):
            cost, share = self._cost_at(price)
            found = self._cheapest(part, cost)
            if found is None:
                return None
            matching, total = found
            if total - price > bound_j:
                bound_j, best_price = total - price, price
            own_j, own_price = self._consider(matching)
            if not self._may_be_better(bound_j):
                return None
            if bound_j >= own_j * (1.0 - ACCURACY):
                return None  # nothing in this part is better than this matching
            if float(share[matching].sum()) > 1.0:
                low, above = price, matching
            else:
                high, below = price, matching
            if high <= low * (1.0 + 1e-9):
                break
            if low < own_price < high:
                price = own_price
            elif math.isinf(high):
                price = low * 8.0
            else:
                price = math.sqrt(low * high) if low else high / 8.0
        pair = self._divide_at(part, above, below)
        if pair is None:
            return None
        return replace(part, price=best_price, bound_j=bound_j, divides_at=pair)

    def _divide_at(
        self, part: _Part, above: Matching | None, below: Matching | None
    ) -> tuple[int, int] | None:
        """Choose the pair to divide at: one on which the matchings do not agree.

        None where a part holds one matching alone, which has been considered.
        """
        one = above if above is not None else below
        assert one is not None
        free = set(zip(*(axis.tolist() for axis in one), strict=True))
        free -= set(part.forced)
        other = below if one is above else None
        if other is not None:
            pairs = set(zip(*(axis.tolist() for axis in other), strict=True))
            free = free - pairs or free
        # The one that needs most of the band.
        return max(free, key=lambda pair: (self._table.least[pair], pair), default=None)

    def _cheapest(
        self, part: _Part, cost: Float64Array
    ) -> tuple[Matching, float] | None:
        """Cheapest matching of a part, of all its devices and blocks."""
        edges = self._table.edges
        cost = np.where(self._possible & ~part.banned, cost, np.inf)
        self.iterations += 1
        if not part.forced:
            return cheapest_matching(cost, edges.demand, all_devices=edges.all_devices)
        rows, columns = np.array(part.forced).T
        held = float(cost[rows, columns].sum())
        left = np.delete(np.arange(len(cost)), rows)
        demand = edges.demand - np.bincount(columns, minlength=edges.demand.size)
        if edges.all_devices:
            # More may be held at a block than it needs.
            demand = np.maximum(demand, 0)
        elif not demand.any():
            return (rows, columns), held
        if not left.size:
            return None if demand.any() else ((rows, columns), held)
        found = _matched(cost[left], demand, all_devices=edges.all_devices)
        if found is None:
            return None
        (others, theirs), total = found
        matching = (
            np.concatenate([rows, left[others]]),
            np.concatenate([columns, theirs]),
        )
        return matching, held + total

    def _cost_at(self, price: float) -> tuple[Float64Array, Float64Array]:
        """Energy and band of each pair at its best share, and that share, [k, n]."""
        full_band_j, least = self._full_band_j, self._table.least
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            best = np.sqrt(full_band_j / price)
            share = np.clip(best, np.minimum(least, 1.0), 1.0)
            upload_j = np.where(full_band_j > 0.0, full_band_j / share, 0.0)
        return self._table.compute_j + upload_j + price * share, share

    def _consider(self, matching: Matching) -> tuple[float, float]:
        """Keep a matching if it is the best; return its energy, and its own price.

        Infinite, both of them, where it does not keep the deadline.
        """
        least = self._table.least[matching]
        if not float(least.sum()) <= WHOLE_BAND:
            return math.inf, math.inf
        full_band_j = self._full_band_j[matching]
        share, price = least_sum_shares(full_band_j, least)
        sending = full_band_j > 0.0
        energy_j = float(self._table.compute_j[matching].sum())
        energy_j += float((full_band_j[sending] / share[sending]).sum())
        if energy_j < self.energy_j:
            self.energy_j, self._matching = energy_j, matching
        return energy_j, price


def _matched(
    cost: Float64Array, demand: IntArray, *, all_devices: bool
) -> tuple[Matching, float] | None:
    """As `cheapest_matching`, also where no block needs anybody any more."""
    if demand.any():
        return cheapest_matching(cost, demand, all_devices=all_devices)
    columns = cost.argmin(axis=1)
    rows = np.arange(len(cost))
    total = float(cost[rows, columns].sum())
    return ((rows, columns), total) if math.isfinite(total) else None


def _reduced_costs(cost: Float64Array, matching: Matching) -> Float64Array:
    """Return by how much a matching that holds a pair costs more than the cheapest.

    At least so much, shape (k, n), as the dual solution of the assignment tells: a
    column's price is no more than what an idle row would cost, nor than what it would
    take for another column's row to come over. 0 where there is no such solution.
    """
    rows, columns = matching
    of_slot = cost[:, columns]  # [k, S]
    idle = np.ones(len(cost), np.bool_)
    idle[rows] = False
    price = of_slot[idle].min(axis=0, initial=np.inf)  # [S]
    own = of_slot[rows, np.arange(rows.size)]
    to_move = of_slot[rows] - own[:, np.newaxis]  # [S, S]
    for _ in range(rows.size):
        price = np.minimum(price, (price[:, np.newaxis] + to_move).min(axis=0))
    if not np.isfinite(price).all():
        return np.zeros_like(cost)
    gain = np.zeros(len(cost))
    gain[rows] = own - price
    more = np.full_like(cost, np.inf)
    of_each = of_slot - gain[:, np.newaxis] - price
    np.minimum.at(more.T, columns, of_each.T)
    return np.maximum(more, 0.0)
