"""Rotation: let other devices meet a block, at a bounded cost in latency.

Under a fast-first allocation a block may see the same device's data round after round.
Rotation looks, among the matchings that end within a factor ``1 + eps`` of a given
allocation, for the one whose (device, block) pairs have met least so far.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from lola_flwr.allocation.edges import Edges
from lola_flwr.allocation.matching import cheapest_matching
from lola_flwr.allocation.problem import AllocationProblem
from lola_flwr.allocation.shares import with_best_shares
from lola_flwr.allocation.shortlist import shortlist
from lola_flwr.allocation.solution import Allocation
from lola_flwr.arrays import Float64Array, IntArray

_MAX_PRICES = 50


def rotate(
    problem: AllocationProblem,
    best: Allocation,
    meetings: ArrayLike,
    *,
    eps: float,
) -> Allocation:
    """Replace an allocation by one whose pairs have met less, within a latency bound.

    Parameters
    ----------
    problem
        The instance.
    best
        An allocation of it, usually the exact optimum.
    meetings
        How often each device has computed each block, counts, shape (K, N).
    eps
        Relative latency that may be given up; 0 returns `best` itself.

    Returns
    -------
    An allocation with the best shares for its matching, whose round_s is at most
    ``(1 + eps) * best.round_s`` and whose pairs have met no more often in sum than
    those of `best`; `best` itself if none is found. Deterministic.

    Raises
    ------
    ValueError
        If eps is negative, or meetings are not counts of shape (K, N).

    Notes
    -----
    A matching keeps the deadline if the least shares for it sum to at most 1, so this
    is an assignment problem (fewest meetings) with one budget (the band). The budget is
    priced into the cost, meetings + price * share, and the price found by the secant
    steps of Handler and Zang, "A dual algorithm for the constrained shortest path
    problem", Networks 10, 1980: from a matching within the budget and one beyond it to
    the price at which they cost the same. That is a Lagrangian heuristic: it may miss
    the fewest meetings by its duality gap, but it never breaks the bound.
    """
    counts = _checked_counts(problem, meetings)
    if not eps >= 0.0:
        raise ValueError(f"eps must be at least 0, but is {eps}.")
    if eps == 0.0:
        return best
    longest_s = (1.0 + eps) * best.round_s
    active = np.flatnonzero(best.block_of_device >= 0)
    if not problem.all_devices:
        # As many devices on each block as now, backups included.
        held = np.bincount(best.block_of_device[active], minlength=problem.num_blocks)
        mode = replace(problem.mode, devices_per_block=held.tolist())
        problem = replace(problem, mode=mode)
    chosen = _fewest_meetings(problem, counts, longest_s - problem.constant_s)
    now = int(counts[active, best.block_of_device[active]].sum())
    if chosen is None or chosen.meetings >= now:
        return best
    rotated = with_best_shares(
        problem,
        chosen.devices,
        chosen.blocks,
        bound_s=best.bound_s,
        iterations=best.iterations,
        stop_reason="rotation",
    )
    return rotated if rotated.round_s <= longest_s else best


@dataclass(frozen=True, eq=False, slots=True)
class _Candidate:
    devices: IntArray
    blocks: IntArray
    meetings: int
    band: float  # sum of the least shares


def _fewest_meetings(
    problem: AllocationProblem, counts: IntArray, deadline_s: float
) -> _Candidate | None:
    """Few meetings within the band: the least shares sum to at most 1; None if not."""

    def meetings_of(edges: Edges) -> IntArray:
        first, last = edges.devices[[0, -1]]
        if last - first + 1 == edges.devices.size:  # a copy would take as long again
            counted = counts[first : last + 1]
        else:
            counted = counts[edges.devices]
        whole = edges.blocks.size == problem.num_blocks
        return counted if whole else counted[:, edges.blocks]

    def share_of(edges: Edges) -> Float64Array:
        # At the cap of 1 an edge needs the whole band or more.
        share = edges.least_share(deadline_s)
        return np.where(share < 1.0, share, np.inf)

    def cheapest(weight: float, price: float) -> _Candidate | None:
        def cost(edges: Edges) -> Float64Array:
            return weight * meetings_of(edges) + price * share_of(edges)

        edges = shortlist(problem, cost)
        found = cheapest_matching(
            cost(edges), edges.demand, all_devices=edges.all_devices
        )
        if found is None:
            return None
        matching, _ = found
        rows, columns = matching
        return _Candidate(
            edges.devices[rows],
            edges.blocks[columns],
            int(meetings_of(edges)[matching].sum()),
            float(share_of(edges)[matching].sum()),
        )

    # Shares are below 1, so together they weigh less than one meeting: among the
    # matchings of fewest meetings this finds the one that needs least band.
    weight = float(problem.num_devices + 1)
    beyond = cheapest(weight, 1.0)
    if beyond is None or beyond.band <= 1.0:
        return beyond
    within = cheapest(0.0, 1.0)
    if within is None or within.band > 1.0:
        return None
    for _ in range(_MAX_PRICES):
        if within.meetings <= beyond.meetings:
            break
        price = (within.meetings - beyond.meetings) / (beyond.band - within.band)
        middle = cheapest(1.0, price)
        value = within.meetings + price * within.band
        if middle is None or middle.meetings + price * middle.band >= value * (
            1.0 - 1e-12
        ):
            break
        if middle.band <= 1.0:
            within = middle
        else:
            beyond = middle
    return within


def _checked_counts(problem: AllocationProblem, meetings: ArrayLike) -> IntArray:
    given = np.asarray(meetings)
    shape = (problem.num_devices, problem.num_blocks)
    if given.shape != shape:
        raise ValueError(f"Shape mismatch: meetings is {given.shape}, must be {shape}.")
    counts = given.astype(np.int64, copy=False)
    if (counts is not given and np.any(counts != given)) or counts.min() < 0:
        raise ValueError("meetings must be whole numbers and not negative.")
    return counts
