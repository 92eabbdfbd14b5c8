"""JBBA: joint bandwidth and block allocation by dual ascent.

Source: Wu, Chen, Huang, "Resource Management for Low-latency Cooperative Fine-tuning of
Foundation Models at the Network Edge", arXiv:2407.09873. The paper decouples blocks and
bandwidth by device-involvement variables, solves the block part by the Hungarian method
helped by CRUNCH and the bandwidth part in closed form. Its step sizes and stopping rule
are not public: those here are ours, as are the bound for payloads that differ between
blocks and the closed-form step of the involvement multipliers.

The dual
--------
Minimise T over matchings p and shares rho subject to, for every device k,
``sum_n p[k,n] (c[k,n] + tau[k,n] / rho[k]) <= T``. With multipliers ``lambda[k] >= 0``
of these constraints, summing to 1, and ``s[k,n] = sqrt(lambda[k] tau[k,n])``, the best
shares are proportional to s and leave

    min over p of  sum p lambda c + z**2,     z = sum p s,

and ``z**2 = max over y of 2 y z - y**2``. Let ``sigma[k] = min_n s[k,n]``, and let the
involvement ``a[k] = sum_n p[k,n]``, with multipliers mu, carry that part of s which
does not depend on the block. For any lambda, mu and y the two parts

    block part       min over matchings of  sum p (lambda c + 2 y (s - sigma) - mu)
    bandwidth part   sum of the S smallest (2 y sigma + mu)  -  y**2

(S devices take part) add up to a lower bound on the best latency. If all blocks have
the same payload, s = sigma and the block part is free of bandwidth, as in the paper.

The bandwidth part never exceeds what the involvement of the block part's own matching
makes of it, and equals it if all ``2 y sigma + mu`` are equal, so ``mu = -2 y sigma``
is the exact maximiser over mu. The bound is concave in y with supergradient
``2 (z - y)``, and, after maximising over y, concave in lambda, with the latency of
device k at the share ``s / y`` as its supergradient.

Large fleets
------------
All multipliers begin alike, and only those of matched devices rise. So the devices that
were never matched have one multiplier, and as good as all of them cost too much in the
block part, as the least of them per block shows. Steps look at the others alone, and
are those that all devices together would lead to.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from lola_flwr.allocation.crunch import solve_crunch_with_shares
from lola_flwr.allocation.edges import Edges, edges_of
from lola_flwr.allocation.matching import Matching, cheapest_matching
from lola_flwr.allocation.outsiders import Outsiders, in_time, one_for_all
from lola_flwr.allocation.problem import AllocationProblem
from lola_flwr.allocation.shares import best_deadline, with_best_shares
from lola_flwr.allocation.shortlist import (
    is_whole,
    rows_with_any,
)
from lola_flwr.allocation.solution import Allocation
from lola_flwr.arrays import Float64Array, IntArray
from lola_flwr.errors import UserError

# A multiplier of 0 could never rise again under multiplicative steps.
_LEAST_MULTIPLIER = 1e-9

# Tables of fewer rows a slot are matched whole.
_FEW_ROWS = 4

# How much dearer rows may become from one step to the next and still be looked at.
_MARGIN = 1.003


@dataclass(frozen=True, eq=False, slots=True)
class DualPoint:
    """Multipliers at which the dual function is evaluated.

    Parameters
    ----------
    latency_multiplier
        lambda, at least 0 and summing to 1, shape (k,).
    involvement_multiplier
        mu, of any sign, shape (k,), seconds.
    root_band_price
        y, at least 0, square root of seconds: the square root of the multiplier of the
        shares' sum.
    """

    latency_multiplier: Float64Array
    involvement_multiplier: Float64Array
    root_band_price: float


def dual_bound(
    edges: Edges, point: DualPoint, cost_s: Float64Array | None = None
) -> tuple[float, Matching] | None:
    """Evaluate the dual function: a lower bound on every matching's latency.

    Parameters
    ----------
    edges
        The round's graph, with uniform power per sub-carrier.
    point
        Multipliers; any point gives a valid bound.
    cost_s
        Computation times to use, shape (k, n), infinite for edges that are cut;
        default: those of the graph.

    Returns
    -------
    The bound in seconds and the block part's matching; None if no matching is left.
    """
    y, price = point.root_band_price, point.latency_multiplier[:, np.newaxis]  # [k, 1]
    compute_s = edges.compute_s if cost_s is None else cost_s
    root = np.sqrt(price * edges.full_band_upload_s)  # s, [k, n]
    common = root.min(axis=1)  # sigma, [k]
    with np.errstate(invalid="ignore"):
        cost = price * compute_s + 2.0 * y * (root - common[:, np.newaxis])
    cost -= point.involvement_multiplier[:, np.newaxis]
    # A multiplier of 0 times an infinite time is NaN, but stays forbidden.
    cost[np.isinf(compute_s)] = np.inf
    found = cheapest_matching(cost, edges.demand, all_devices=edges.all_devices)
    if found is None:
        return None
    matching, block_part = found
    involvement = 2.0 * y * common + point.involvement_multiplier
    rows, _ = matching
    smallest = np.sort(involvement)[: rows.size]
    return block_part + float(smallest.sum()) - y * y, matching


def solve_jbba(
    problem: AllocationProblem,
    *,
    max_iterations: int = 200,
    gap_tolerance: float = 1e-3,
    time_limit_s: float | None = None,
    step_size: float = 0.3,
    on_iteration: Callable[[float, float], None] | None = None,
) -> Allocation:
    """Allocate blocks and bandwidth by dual ascent.

    Parameters
    ----------
    problem
        The instance, in any mode but with uniform power per sub-carrier.
    max_iterations
        Largest number of ascent steps.
    gap_tolerance
        Stop as soon as round_s / bound_s - 1 is at most this.
    time_limit_s
        Stop after this many seconds; None for no limit, which keeps the result
        independent of the machine.
    step_size
        First step of the latency multipliers, relative: no multiplier changes by more
        than this exponent. Step t is smaller by sqrt(t).
    on_iteration
        Called after every step with the dual value of this step and the latency of the
        best allocation so far, seconds.

    Returns
    -------
    The best allocation found, the best dual bound, and as stop reason "gap",
    "iterations" or "time". The problem has a duality gap, so on most instances the
    bound stays well below even the optimum.

    Raises
    ------
    InfeasibleAllocation
        If no matching exists; says why.
    UserError
        If the devices are power-limited.
    """
    if problem.power_limited is not None:
        raise UserError(
            "The allocator 'jbba' needs uniform power per sub-carrier: its bandwidth "
            "part has no closed form when power_limited is set. Use 'exact'."
        )
    started = time.perf_counter()
    incumbent = solve_crunch_with_shares(problem)
    ascent = _ascent(problem, incumbent.round_s - problem.constant_s, step_size)
    reason = "iterations"
    iterations = 0
    while True:
        if ascent.gap(problem.constant_s) <= gap_tolerance:
            reason = "gap"
            break
        if iterations == max_iterations:
            break
        if time_limit_s is not None and time.perf_counter() - started >= time_limit_s:
            reason = "time"
            break
        value_s = ascent.step()
        iterations += 1
        if on_iteration is not None:
            on_iteration(
                problem.constant_s + value_s, problem.constant_s + ascent.deadline_s
            )
    if ascent.best is not None:
        incumbent = with_best_shares(problem, *ascent.best)
    return replace(
        incumbent,
        bound_s=min(problem.constant_s + ascent.bound_s, incumbent.round_s),
        iterations=iterations,
        stop_reason=reason,
    )


def _ascent(problem: AllocationProblem, deadline_s: float, step_size: float) -> _Ascent:
    if is_whole(problem):
        return _Ascent(edges_of(problem), deadline_s, step_size)
    nobody = edges_of(problem, np.empty(0, np.int64))
    return _Ascent(nobody, deadline_s, step_size, Outsiders(problem))


class _Ascent:
    """Multipliers, best bound and best matching of one run.

    In a large fleet most devices are never matched. Then their multipliers are all the
    same, and only those are looked at, the *near* ones, that may be cheap enough: see
    `Outsiders`.
    """

    def __init__(
        self,
        near: Edges,
        deadline_s: float,
        step_size: float,
        outsiders: Outsiders | None = None,
    ) -> None:
        self.deadline_s = deadline_s
        self.bound_s = 0.0
        # Devices and blocks; None: still the first incumbent.
        self.best: Matching | None = None
        self._step_size = step_size
        self._steps = 0
        self._outsiders = outsiders
        num_devices = (
            near.devices.size if outsiders is None else outsiders.problem.num_devices
        )
        self._common = 1.0 / num_devices  # the multiplier of those who are not near
        # Half of the round spent on uploads: the right order of magnitude suffices.
        self._root_band_price = float(np.sqrt(0.5 * deadline_s))
        self._multiplier: Float64Array = np.empty(0)
        # What the cheapest device of each block costs that is not matched.
        self._spare = np.full(near.blocks.size, np.inf)
        self._devices: IntArray = np.empty(0, np.int64)
        self._let_in(near)

    def gap(self, constant_s: float) -> float:
        """Relative gap of the round latency, the constant part included."""
        missing = self.deadline_s - self.bound_s
        if missing <= 0.0:
            return 0.0
        bound = constant_s + self.bound_s
        return missing / bound if bound > 0.0 else float("inf")

    def step(self) -> float:
        """Evaluate the dual, try its matching, move the multipliers; the bound."""
        found = self._block_part()
        if found is None:
            self.bound_s = self.deadline_s
            return self.deadline_s
        matching, total = found
        y = self._root_band_price
        # The bandwidth part's involvement costs nothing: mu is its exact maximiser.
        value_s = min(total - y * y, self.deadline_s)
        self.bound_s = max(self.bound_s, value_s)
        compute_s = self._edges.compute_s[matching]
        upload_s = self._edges.full_band_upload_s[matching]
        self._recover(matching, compute_s, upload_s)
        self._climb(matching[0], compute_s, upload_s)
        return value_s

    def _let_in(self, near: Edges) -> None:
        """Look at these devices from now on; those who are new have been outside."""
        multiplier = np.full(near.devices.size, self._common)
        known = np.searchsorted(near.devices, self._devices)
        multiplier[known] = self._multiplier
        self._spare = np.full_like(self._spare, np.inf)
        self._multiplier, self._devices, self._edges = multiplier, near.devices, near
        # Column by column: columns are long, and rows short.
        self._upload_s = np.asfortranarray(one_for_all(near.full_band_upload_s))
        self._compute_s = np.asfortranarray(near.compute_s)
        self._cut_s = in_time(self._compute_s, self._upload_s, self.deadline_s)

    def _block_part(self) -> tuple[Matching, float] | None:
        """Cheapest matching under the multipliers, and what it costs."""
        found = self._cheapest(self._cost())
        if self._outsiders is None:
            return found
        spare = self._spare / self._common
        if found is not None and self._outsiders.are_dearer(spare, self._price_of_root):
            return found
        more = self._outsiders.cheapest(self._price_of_root, self.deadline_s)
        self._let_in(edges_of(self._outsiders.problem, more))
        return self._cheapest(self._cost())

    @property
    def _price_of_root(self) -> float:
        """What the root of an outsider's upload time costs, where its time costs 1."""
        return 2.0 * self._root_band_price / float(np.sqrt(self._common))

    def _cost(self) -> Float64Array:
        """Return what the edges cost in the block part at the best mu, (k, n)."""
        y, price = self._root_band_price, self._multiplier[:, np.newaxis]
        root = np.sqrt(price * self._upload_s)  # s
        cost: Float64Array = price * self._cut_s
        if root.shape[1] > 1:
            common = root.min(axis=1, keepdims=True)  # sigma
            cost += 2.0 * y * (root - common)
            root = common
        cost += 2.0 * y * root
        return cost

    def _cheapest(self, cost: Float64Array) -> tuple[Matching, float] | None:
        """Cheapest matching, found among the rows that are cheap in some column.

        What the cheapest row costs that is not matched is what no other row has to
        undercut: then a cheapest matching needs none of these.
        """
        demand = self._edges.demand
        if self._outsiders is None:
            everyone = self._edges.all_devices
            return cheapest_matching(cost, demand, all_devices=everyone)
        enough = self._spare * _MARGIN
        if len(cost) <= _FEW_ROWS * int(demand.sum()):
            enough = np.full_like(enough, np.inf)
        while True:
            cheap = (
                slice(None) if np.isinf(enough).all() else rows_with_any(cost < enough)
            )
            table = cost[cheap]
            found = cheapest_matching(table, demand, all_devices=False)
            if found is None:
                if isinstance(cheap, slice):
                    return None
                enough = np.full_like(enough, np.inf)
                continue
            (rows, columns), total = found
            table[rows] = np.inf
            self._spare = table.min(axis=0)
            if (self._spare <= enough).all():
                break
            enough = np.maximum(enough, self._spare * _MARGIN)
        if not isinstance(cheap, slice):
            rows = cheap[rows]
        return (rows, columns), total

    def _recover(
        self, matching: Matching, compute_s: Float64Array, upload_s: Float64Array
    ) -> None:
        """Give the block part's matching its best shares and keep it if it is best."""
        band = (upload_s / (self.deadline_s - compute_s)).sum()
        if band > 1.0 + 1e-9:
            return  # not by the incumbent's deadline
        deadline_s = best_deadline(compute_s, upload_s)
        if deadline_s < self.deadline_s:
            rows, columns = matching
            self.deadline_s = deadline_s
            self.best = self._edges.devices[rows], self._edges.blocks[columns]
            self._cut_s = in_time(self._compute_s, self._upload_s, deadline_s)

    def _climb(
        self, rows: IntArray, compute_s: Float64Array, upload_s: Float64Array
    ) -> None:
        """Move along the supergradients: a late device's multiplier rises."""
        y, price = self._root_band_price, self._multiplier[rows]
        latency_s = compute_s + y * np.sqrt(upload_s / price)
        self._steps += 1
        largest = latency_s.max()
        if largest > 0.0:
            # Exponentiated (mirror) ascent keeps the multipliers on the simplex.
            step = self._step_size / np.sqrt(self._steps) / largest
            self._multiplier[rows] *= np.exp(step * latency_s)
            self._normalise()
            np.maximum(self._multiplier, _LEAST_MULTIPLIER, out=self._multiplier)
            self._common = max(self._common, _LEAST_MULTIPLIER)
            self._normalise()
        demanded = float(np.sqrt(price * upload_s).sum())  # z
        self._root_band_price = 0.5 * (y + demanded)

    def _normalise(self) -> None:
        total = float(self._multiplier.sum())
        if self._outsiders is not None:
            outside = self._outsiders.problem.num_devices - self._multiplier.size
            total += outside * self._common
        self._multiplier /= total
        self._common /= total
