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
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from lola_flwr.allocation.crunch import solve_crunch_with_shares
from lola_flwr.allocation.edges import Edges, edges_of
from lola_flwr.allocation.matching import Matching, cheapest_matching
from lola_flwr.allocation.problem import AllocationProblem
from lola_flwr.allocation.shares import best_deadline, with_best_shares
from lola_flwr.allocation.solution import Allocation
from lola_flwr.arrays import Float64Array

# A multiplier of 0 could never rise again under multiplicative steps.
_LEAST_MULTIPLIER = 1e-9


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
    ValueError
        If the devices are power-limited.
    """
    if problem.power_limited is not None:
        raise ValueError(
            "The allocator 'jbba' needs uniform power per sub-carrier: its bandwidth "
            "part has no closed form when power_limited is set. Use 'exact'."
        )
    started = time.perf_counter()
    incumbent = solve_crunch_with_shares(problem)
    edges = edges_of(problem)
    ascent = _Ascent(edges, incumbent.round_s - problem.constant_s, step_size)
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
        rows, columns = ascent.best
        incumbent = with_best_shares(
            problem, edges.devices[rows], edges.blocks[columns]
        )
    return replace(
        incumbent,
        bound_s=min(problem.constant_s + ascent.bound_s, incumbent.round_s),
        iterations=iterations,
        stop_reason=reason,
    )


class _Ascent:
    """Multipliers, best bound and best matching of one run."""

    def __init__(self, edges: Edges, deadline_s: float, step_size: float) -> None:
        self.deadline_s = deadline_s
        self.bound_s = 0.0
        self.best: Matching | None = None  # None: still the first incumbent
        self._edges = edges
        self._step_size = step_size
        self._steps = 0
        num_devices = edges.compute_s.shape[0]
        self._multiplier = np.full(num_devices, 1.0 / num_devices)
        # Half of the round spent on uploads: the right order of magnitude suffices.
        self._root_band_price = float(np.sqrt(0.5 * deadline_s))

    def gap(self, constant_s: float) -> float:
        """Relative gap of the round latency, the constant part included."""
        missing = self.deadline_s - self.bound_s
        if missing <= 0.0:
            return 0.0
        bound = constant_s + self.bound_s
        return missing / bound if bound > 0.0 else float("inf")

    def step(self) -> float:
        """Evaluate the dual, try its matching, move the multipliers; the bound."""
        edges, y = self._edges, self._root_band_price
        point = DualPoint(self._multiplier, -2.0 * y * self._common_root(), y)
        # CRUNCH's cutting: an edge that is too slow even with the whole band is in no
        # round that beats the incumbent. So either the incumbent is optimal, or the
        # optimum is a matching of what is left: the bound holds up to the incumbent.
        # An edge that would beat it by no more than rounding is cut, too.
        whole_band_s = edges.compute_s + edges.full_band_upload_s
        cut_s = np.where(
            whole_band_s < self.deadline_s * (1.0 - 1e-12), edges.compute_s, np.inf
        )
        found = dual_bound(edges, point, cut_s)
        if found is None:
            self.bound_s = self.deadline_s
            return self.deadline_s
        value_s, matching = found
        value_s = min(value_s, self.deadline_s)
        self.bound_s = max(self.bound_s, value_s)
        self._recover(matching)
        self._climb(matching)
        return value_s

    def _common_root(self) -> Float64Array:
        least: Float64Array = self._edges.full_band_upload_s.min(axis=1)
        return np.sqrt(self._multiplier * least)

    def _recover(self, matching: Matching) -> None:
        """Give the block part's matching its best shares and keep it if it is best."""
        deadline_s = best_deadline(
            self._edges.compute_s[matching], self._edges.full_band_upload_s[matching]
        )
        if deadline_s < self.deadline_s:
            self.deadline_s, self.best = deadline_s, matching

    def _climb(self, matching: Matching) -> None:
        """Move along the supergradients: a late device's multiplier rises."""
        rows, _ = matching
        multiplier, y = self._multiplier, self._root_band_price
        upload_s = self._edges.full_band_upload_s[matching]
        latency_s = np.zeros_like(multiplier)
        latency_s[rows] = self._edges.compute_s[matching] + y * np.sqrt(
            upload_s / multiplier[rows]
        )
        self._steps += 1
        largest = latency_s.max()
        if largest > 0.0:
            # Exponentiated (mirror) ascent keeps the multipliers on the simplex.
            step = self._step_size / np.sqrt(self._steps) / largest
            raised = multiplier * np.exp(step * latency_s)
            raised = np.maximum(raised / raised.sum(), _LEAST_MULTIPLIER)
            self._multiplier = raised / raised.sum()
        demanded = float(np.sqrt(multiplier[rows] * upload_s).sum())  # z
        self._root_band_price = 0.5 * (y + demanded)
