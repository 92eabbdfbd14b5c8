"""Uploads in turn (TDMA): each has the whole band, one after the other.

For a given matching the order in which devices have computed is the best: it is the
problem of one machine with release times, and the last upload ends at the largest of
``t + sum of the uploads of those that compute until t or longer``, over the times t at
which devices have computed. The round of the same matching under OFDMA is no shorter:
its uploads, too, have to fit between t and its end, for every t.

Which matching is best is an integer program: an assignment with one such constraint for
each time. (With one of them alone, kept within a limit, it would be an assignment with
a budget, which is NP-hard.) What the uploads from one time on come to at least is an
assignment problem, whose optimum is a bound, mostly a close one, and whose matchings
are good. HiGHS does the rest, among the pairs that can be in a better round and for
which no others do as well.
"""

from __future__ import annotations

from bisect import insort
from typing import TYPE_CHECKING

import numpy as np

from lola_flwr.allocation.edges import Edges, edges_of
from lola_flwr.allocation.matching import Matching, cheapest_matching
from lola_flwr.allocation.problem import AllocationProblem
from lola_flwr.arrays import BoolArray, Float64Array, IntArray
from lola_flwr.machine.output import stdout_without

if TYPE_CHECKING:
    from scipy.sparse import csr_array

# To which HiGHS keeps constraints and bounds, relative to the round.
TOLERANCE = 1e-6

# Times whose constraint is looked at alone, and what is sent before counts for in turn:
# nothing, for a bound, and a little, for good matchings.
_TIMES = 24
_WEIGHTS = (0.0, 0.05, 1.0)

# What milp says.
_OPTIMAL, _INFEASIBLE = 0, 2


def turns_s(compute_s: Float64Array, upload_s: Float64Array) -> Float64Array:
    """Return how long each device waits for its turn, seconds, shape (A,).

    Parameters
    ----------
    compute_s, upload_s
        When each device has computed, and how long it sends over the whole band.
    """
    order = np.argsort(compute_s, kind="stable")
    compute_s, upload_s = compute_s[order], upload_s[order]
    # The band is free after those before, however long any of them kept it waiting.
    sent_s = np.cumsum(upload_s)
    before_s = sent_s - upload_s
    end_s = np.maximum.accumulate(compute_s - before_s) + sent_s
    waits_s = np.empty_like(end_s)
    waits_s[order] = np.maximum(end_s - upload_s - compute_s, 0.0)
    # Who has nothing to send needs no turn.
    waits_s[order[upload_s == 0.0]] = 0.0
    return waits_s


def round_in_turn_s(compute_s: Float64Array, upload_s: Float64Array) -> float:
    """Return when the last upload ends, seconds."""
    return float((compute_s + turns_s(compute_s, upload_s) + upload_s).max())


def least_in_turn(
    problem: AllocationProblem, first: Matching, time_limit_s: float
) -> tuple[Matching, float, bool]:
    """Find the matching whose uploads in turn end earliest.

    Parameters
    ----------
    problem
        The instance.
    first
        Devices and blocks of a matching to begin with.
    time_limit_s
        When to stop, seconds.

    Returns
    -------
    Devices and blocks; a lower bound on when uploads can have ended; and whether they
    have by then, but for `TOLERANCE`.
    """
    edges = edges_of(problem)
    best, low_s = _by_budgets(problem, edges, first)
    best_s = _round_s(problem, best)
    if low_s >= best_s * (1.0 - 1e-12):
        return best, best_s, True
    kept = _useful(edges, best_s)
    found, bound_s, is_best = _Program(edges, kept, best_s).solve(low_s, time_limit_s)
    if found is not None and _round_s(problem, found) < best_s:
        best, best_s = found, _round_s(problem, found)
    return best, min(max(bound_s, low_s), best_s), is_best


def _by_budgets(
    problem: AllocationProblem, edges: Edges, first: Matching
) -> tuple[Matching, float]:
    """Return a good matching, and a bound: by the constraint of one time each.

    What has to be sent from a time on is least in the cheapest matching by that, and no
    round ends before it is sent.
    """
    best, best_s, low_s = first, _round_s(problem, first), 0.0
    kept = _useful(edges, best_s)
    if not kept.any():
        return best, best_s
    times_s = np.unique(edges.compute_s[kept])
    some = np.linspace(0, times_s.size - 1, _TIMES).round().astype(int)
    for time_s in times_s[np.unique(some)]:
        for weight in _WEIGHTS:
            counts = (edges.compute_s >= time_s) + weight
            cost = np.where(kept, edges.full_band_upload_s * counts, np.inf)
            found = cheapest_matching(cost, edges.demand, all_devices=edges.all_devices)
            if found is None:  # no round is shorter
                return best, best_s
            (rows, columns), sent_s = found
            if weight == 0.0 and sent_s > 0.0:
                low_s = max(low_s, float(time_s) + sent_s)
            matching = edges.devices[rows], edges.blocks[columns]
            if _round_s(problem, matching) < best_s:
                best, best_s = matching, _round_s(problem, matching)
    return best, low_s


def _round_s(problem: AllocationProblem, matching: Matching) -> float:
    return round_in_turn_s(
        problem.compute_s[matching], problem.full_band_upload_s[matching]
    )


def _useful(edges: Edges, best_s: float) -> BoolArray:
    """Tell which pairs a better round may need, shape (k, n).

    Of a block it needs no pair than which as many others compute and upload no longer
    as devices take part: one of those devices is idle, and does as well.
    """
    kept = np.asarray(edges.possible & (edges.latency_s(1.0) < best_s))
    slots = int(edges.demand.sum())
    if edges.all_devices or len(kept) <= slots:
        return kept
    for column in range(kept.shape[1]):
        rows = np.flatnonzero(kept[:, column])
        compute_s = edges.compute_s[rows, column]
        upload_s = edges.full_band_upload_s[rows, column]
        order = np.lexsort((upload_s, compute_s))
        rows, upload_s = rows[order], upload_s[order]
        # Of those that have computed no later, as many of the quickest uploads.
        quickest = sorted(upload_s[:slots].tolist())
        place = slots
        while place < rows.size:
            quicker = upload_s[place:] < quickest[-1]
            step = int(quicker.argmax()) if quicker.any() else quicker.size
            kept[rows[place : place + step], column] = False
            place += step + 1
            if step < quicker.size:
                insort(quickest, float(upload_s[place - 1]))
                quickest.pop()
    return kept


class _Program:
    """The integer program over pairs, in parts of the best round so far.

    Variables: whether each pair is chosen, x [E], of the pairs in falling order of
    their computation; how long the chosen ones up to each upload, s [E]; how many of
    them up to each there are in its group, z [E], at most one; the end of the round.
    """

    def __init__(self, edges: Edges, kept: BoolArray, best_s: float) -> None:
        rows, columns = np.nonzero(kept)
        order = np.argsort(-edges.compute_s[rows, columns], kind="stable")
        self._rows, self._columns = rows[order], columns[order]
        self._edges = edges
        self._best_s = best_s
        pair = self._rows, self._columns
        self._compute = edges.compute_s[pair] / best_s
        self._upload = edges.full_band_upload_s[pair] / best_s

    def solve(
        self, low_s: float, time_limit_s: float
    ) -> tuple[Matching | None, float, bool]:
        """Return devices and blocks, a bound, and whether it is reached.

        Parameters
        ----------
        low_s
            A bound that is known, seconds.
        time_limit_s
            When to stop, seconds.
        """
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array, diags_array, hstack, vstack

        size = self._rows.size
        if size == 0:
            return None, self._best_s, True
        one, none = diags_array(np.ones(size)), csr_array((size, size))
        zero, ones = csr_array((size, 1)), csr_array(np.ones((size, 1)))
        demand, all_devices = self._edges.demand, self._edges.all_devices
        alone = not all_devices and demand.max() == 1
        group = self._columns if alone else self._rows
        steps = vstack(
            [
                hstack(
                    [
                        diags_array(-self._upload),
                        one - _before(np.zeros(size)),
                        none,
                        zero,
                    ]
                ),
                hstack([-one, none, one - _before(group), zero]),
            ]
        )
        ends = hstack([none, -one, -diags_array(self._compute), ones])
        cover = hstack(
            [
                _counted(self._columns, demand.size),
                csr_array((demand.size, 2 * size + 1)),
            ]
        )
        num_devices = len(self._edges.devices)
        busy = hstack(
            [
                _counted(self._rows, num_devices),
                csr_array((num_devices, 2 * size + 1)),
            ]
        )
        most = np.inf if all_devices else demand
        cost = np.zeros(3 * size + 1)
        cost[-1] = 1.0
        whole = np.zeros(cost.size, np.int64)
        whole[:size] = 1
        lower = np.zeros(cost.size)
        lower[-1] = low_s / self._best_s * (1.0 - TOLERANCE)
        upper = np.ones(cost.size)
        upper[size : 2 * size] = np.inf
        with stdout_without("HighsMipSolverData::"):
            found = milp(
                cost,
                integrality=whole,
                bounds=Bounds(lower, upper),
                constraints=[
                    LinearConstraint(steps, 0, 0),
                    LinearConstraint(ends, 0, np.inf),
                    LinearConstraint(cover, demand, most),
                    LinearConstraint(busy, float(all_devices), 1),
                ],
                options={"mip_rel_gap": 0.0, "time_limit": time_limit_s},
            )
        if found.status == _INFEASIBLE:  # no round is shorter
            return None, self._best_s * (1.0 - TOLERANCE), True
        bound = found.mip_dual_bound
        bound_s = 0.0 if bound is None else self._best_s * (bound - TOLERANCE)
        if found.x is None:
            return None, bound_s, False
        chosen = np.flatnonzero(found.x[:size] > 0.5)
        devices = self._edges.devices[self._rows[chosen]]
        blocks = self._edges.blocks[self._columns[chosen]]
        return (devices, blocks), bound_s, found.status == _OPTIMAL


def _before(group: IntArray | Float64Array) -> csr_array:
    """Return a matrix that takes from each pair to the one before it in its group."""
    from scipy.sparse import csr_array

    order = np.argsort(group, kind="stable")
    same = np.flatnonzero(group[order][1:] == group[order][:-1])
    pairs = order[same + 1], order[same]
    return csr_array((np.ones(same.size), pairs), shape=(group.size, group.size))


def _counted(group: IntArray, count: int) -> csr_array:
    """Return a matrix that counts the pairs of each group."""
    from scipy.sparse import csr_array

    number = np.arange(group.size)
    return csr_array((np.ones(group.size), (group, number)), shape=(count, group.size))
