"""The exact optimum over blocks and shares together, in polynomial time.

Goes beyond Wu, Chen, Huang, arXiv:2407.09873, which solves this problem by dual ascent
(see `lola_flwr.allocation.jbba`).

For a deadline T an edge needs the share ``w = tau / (T - c)``, and T is achievable if
and only if some matching needs at most the whole band, that is, if the cheapest
matching under w does: one assignment problem. All w fall as T grows, so from any
matching's own best deadline T either the cheapest matching under w(T) has a smaller
deadline, or T is the optimum. This is Newton's (Dinkelbach's) iteration; it falls
strictly, visits no matching twice and ends after 2 to 4 assignments in practice.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lola_flwr.allocation.crunch import bottleneck_matching
from lola_flwr.allocation.edges import Edges
from lola_flwr.allocation.in_turn import least_in_turn
from lola_flwr.allocation.infeasible import explain_infeasible
from lola_flwr.allocation.matching import Matching, cheapest_matching
from lola_flwr.allocation.problem import AllocationProblem
from lola_flwr.allocation.shares import best_deadline, with_best_shares
from lola_flwr.allocation.shortlist import is_whole, shortlist
from lola_flwr.allocation.solution import Allocation
from lola_flwr.arrays import Float64Array

# How long the best matching of devices that send in turn is looked for, seconds.
IN_TURN_LIMIT_S = 1.0


def solve_exact(problem: AllocationProblem, *, max_iterations: int = 100) -> Allocation:
    """Find the allocation of the least possible round latency.

    Parameters
    ----------
    problem
        The instance, in any mode.
    max_iterations
        Largest number of assignment problems to solve.

    Returns
    -------
    The optimum, with ``bound_s == round_s``. If the iterations run out first, the best
    allocation so far with a NaN bound and the stop reason "iterations". Where devices
    send in turn, the search for it ends after some time; then the stop reason is
    "time", and the bound what was proven by then.

    Raises
    ------
    InfeasibleAllocation
        If no matching exists; says why.

    Notes
    -----
    Large fleets are pruned (`lola_flwr.allocation.shortlist`). Which devices are
    cheapest depends on the deadline. Each pass over all devices prunes at the current
    deadline; the optimum among the survivors is the optimum of all as soon as a pass
    leads to no smaller deadline.
    """
    if problem.in_turn:
        return _in_turn(problem, max_iterations)
    equal_share = 1.0 / problem.num_active
    edges = shortlist(problem, lambda edges: edges.latency_s(equal_share))
    start = _starting_matching(edges, equal_share)
    if start is None:
        raise explain_infeasible(problem)
    search = _Search(max_iterations)
    search.consider(edges, start)
    search.descend(edges)
    deadline_s = np.inf
    while search.deadline_s < deadline_s and not (
        is_whole(problem) or search.exhausted
    ):
        deadline_s = search.deadline_s
        search.descend(shortlist(problem, search.least_share))
        if search.deadline_s == deadline_s:
            break
    allocation = with_best_shares(
        problem,
        search.devices,
        search.blocks,
        iterations=search.iterations,
        stop_reason="iterations" if search.exhausted else "optimal",
    )
    if search.exhausted:
        return allocation
    return replace(allocation, bound_s=allocation.round_s)


def _in_turn(problem: AllocationProblem, max_iterations: int) -> Allocation:
    """Let devices send in turn: from the matching that is best where they share."""
    shared = solve_exact(replace(problem, in_turn=False), max_iterations=max_iterations)
    active = np.flatnonzero(shared.block_of_device >= 0)
    (devices, blocks), bound_s, is_best = least_in_turn(
        problem, (active, shared.block_of_device[active]), IN_TURN_LIMIT_S
    )
    return with_best_shares(
        problem,
        devices,
        blocks,
        bound_s=problem.constant_s + bound_s,
        iterations=shared.iterations,
        stop_reason="optimal" if is_best else "time",
    )


class _Search:
    """The best matching so far, and the iteration that improves on it."""

    def __init__(self, max_iterations: int) -> None:
        self.iterations = 0
        self.exhausted = False
        self.deadline_s = np.inf
        self._max_iterations = max_iterations

    def least_share(self, edges: Edges) -> Float64Array:
        """Share that each edge needs to meet the deadline."""
        return edges.least_share(self.deadline_s)

    def consider(self, edges: Edges, matching: Matching) -> bool:
        """Keep a matching if its best deadline is smaller; tell whether it is."""
        rows, columns = matching
        deadline_s = best_deadline(
            edges.compute_s[rows, columns],
            edges.full_band_upload_s[rows, columns],
            None if edges.snr is None else edges.snr[rows, 0],
        )
        if not deadline_s < self.deadline_s:
            return False
        self.deadline_s = deadline_s
        self.devices, self.blocks = edges.devices[rows], edges.blocks[columns]
        return True

    def descend(self, edges: Edges) -> None:
        """Newton's iteration within some edges, from the deadline at hand."""
        while True:
            if self.iterations == self._max_iterations:
                self.exhausted = True
                return
            self.iterations += 1
            # An edge at the cap of 1 needs the whole band, so a matching that holds
            # one costs at least 1, and so is no improvement. A matching that would
            # end before the deadline computes before it and costs less than 1.
            found = cheapest_matching(
                self.least_share(edges),
                edges.demand,
                all_devices=edges.all_devices,
            )
            if found is None:
                return
            matching, band = found
            if band >= 1.0 or not self.consider(edges, matching):
                return


def _starting_matching(edges: Edges, equal_share: float) -> Matching | None:
    """Good first matching, None if there is no matching at all.

    A guessed deadline is as good as a proven one here: the cheapest matching at any
    deadline has a best deadline of its own, which is achievable. The guess is the
    CRUNCH optimum under equal shares if latencies are monotone: for every depth the
    latency of as many devices as the blocks down there need. If an edge at the cap of
    1 shows that the guess is too low, the true bottleneck matching takes its place.
    """
    latency_s = edges.latency_s(equal_share)
    wanted = np.cumsum(edges.demand)
    if wanted[-1] > latency_s.shape[0]:
        return None
    ranked = np.sort(latency_s, axis=0)
    guess_s = float(ranked[wanted - 1, np.arange(wanted.size)].max())
    if np.isfinite(guess_s):
        cost = edges.least_share(guess_s)
        found = cheapest_matching(cost, edges.demand, all_devices=edges.all_devices)
        if found is not None and cost[found[0]].max() < 1.0:
            return found[0]
    return bottleneck_matching(edges, latency_s)
