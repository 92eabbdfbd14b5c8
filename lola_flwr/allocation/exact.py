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
from lola_flwr.allocation.edges import Edges, edges_of
from lola_flwr.allocation.infeasible import explain_infeasible
from lola_flwr.allocation.matching import Matching, cheapest_matching
from lola_flwr.allocation.problem import AllocationProblem
from lola_flwr.allocation.shares import best_deadline, with_best_shares
from lola_flwr.allocation.solution import Allocation
from lola_flwr.arrays import IntArray

# Fleets up to this size are solved whole; pruning costs more than it saves there.
_WHOLE_FLEET = 256

# Rows of one step of a pass over all devices: its tables stay in the CPU's cache.
_ROWS_A_STEP = 4096


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
    allocation so far with a NaN bound and the stop reason "iterations".

    Raises
    ------
    InfeasibleAllocation
        If no matching exists; says why.

    Notes
    -----
    Large fleets are pruned to the S cheapest devices of each block, S being the number
    of slots (devices that the blocks need in all). This keeps an optimum: if a cheapest
    matching gives some block a device that is not among that block's S cheapest, then
    at most S - 1 of those are busy elsewhere, so one of them is free, no dearer, and
    can take over. The same holds for the bottleneck matching that the iteration starts
    from, and for the question whether any matching exists.

    Which devices are cheapest depends on the deadline. Each pass over all devices
    prunes at the current deadline; the optimum among the survivors is the optimum of
    all as soon as a pass leads to no smaller deadline. Time and memory are linear in
    the number of devices.
    """
    whole = problem.all_devices or problem.num_devices <= _WHOLE_FLEET
    edges = edges_of(problem) if whole else _shortlist(problem, None)
    start = _starting_matching(edges, 1.0 / problem.num_active)
    if start is None:
        raise explain_infeasible(problem)
    search = _Search(max_iterations)
    search.consider(edges, start)
    search.descend(edges)
    while not whole and not search.exhausted:
        deadline_s = search.deadline_s
        search.descend(_shortlist(problem, deadline_s))
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


class _Search:
    """The best matching so far, and the iteration that improves on it."""

    def __init__(self, max_iterations: int) -> None:
        self.iterations = 0
        self.exhausted = False
        self.deadline_s = np.inf
        self._max_iterations = max_iterations

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
                edges.least_share(self.deadline_s),
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


def _shortlist(problem: AllocationProblem, deadline_s: float | None) -> Edges:
    """Edges of the devices that are among the cheapest of some block.

    Parameters
    ----------
    problem
        The instance.
    deadline_s
        Deadline at which an edge costs its least share; None: it costs its latency
        under equal shares.
    """
    slots = int(problem.demand.sum())
    blocks = np.flatnonzero(problem.demand)
    cheapest = np.empty((0, blocks.size))  # [up to S, n]
    devices: IntArray = np.empty((0, blocks.size), dtype=np.int64)
    limit = np.full(blocks.size, np.inf)  # of each block: S-th least cost so far
    for first in range(0, problem.num_devices, _ROWS_A_STEP):
        edges = edges_of(problem, slice(first, first + _ROWS_A_STEP))
        cost = (
            edges.latency_s(1.0 / problem.num_active)
            if deadline_s is None
            else edges.least_share(deadline_s)
        )
        better = np.unique(np.flatnonzero(cost < limit) // blocks.size)
        if better.size == 0:
            continue
        newcomers = np.broadcast_to(
            first + better[:, np.newaxis], (better.size, blocks.size)
        )
        cheapest = np.concatenate([cheapest, cost[better]])  # [S + better, n]
        devices = np.concatenate([devices, newcomers])  # [S + better, n]
        if cheapest.shape[0] <= slots:
            continue
        kept = np.argpartition(cheapest, slots - 1, axis=0)[:slots]
        cheapest = np.take_along_axis(cheapest, kept, axis=0)
        devices = np.take_along_axis(devices, kept, axis=0)
        limit = cheapest.max(axis=0)
    return edges_of(problem, np.unique(devices))
