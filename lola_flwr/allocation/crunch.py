"""CRUNCH: the optimal matching under fixed shares (Cutting, RecoUNting, CHecking).

With the shares given, every edge has a fixed latency and the round needs the matching
whose slowest edge is fastest. Source: Wu, Chen, Huang, "Resource Management for
Low-latency Cooperative Fine-tuning of Foundation Models at the Network Edge",
arXiv:2407.09873.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lola_flwr.allocation.edges import Edges, edges_of
from lola_flwr.allocation.infeasible import explain_infeasible
from lola_flwr.allocation.matching import Matching, any_matching, slots_of
from lola_flwr.allocation.problem import AllocationProblem
from lola_flwr.allocation.shares import with_best_shares, with_equal_shares
from lola_flwr.allocation.shortlist import is_whole, shortlist
from lola_flwr.allocation.solution import Allocation
from lola_flwr.arrays import Float64Array, IntArray


def solve_crunch(problem: AllocationProblem) -> Allocation:
    """Find the matching that is optimal under equal shares, and keep those shares.

    Parameters
    ----------
    problem
        The instance.

    Raises
    ------
    InfeasibleAllocation
        If no matching exists; says why.
    """
    devices, blocks = _equal_share_matching(problem)
    return with_equal_shares(problem, devices, blocks)


def solve_crunch_with_shares(problem: AllocationProblem) -> Allocation:
    """Give the matching of `solve_crunch` the shares that are best for it.

    Parameters and errors are those of `solve_crunch`.
    """
    devices, blocks = _equal_share_matching(problem)
    return with_best_shares(problem, devices, blocks)


def _equal_share_matching(problem: AllocationProblem) -> Matching:
    monotone = True

    def latency_s(edges: Edges) -> Float64Array:
        nonlocal monotone
        seconds = edges.latency_s(1.0 / problem.num_active)
        monotone = monotone and is_monotone(seconds)
        return seconds

    edges = shortlist(problem, latency_s)
    near_s = latency_s(edges)
    matching = bottleneck_matching(edges, near_s)
    if matching is None:
        raise explain_infeasible(problem)
    rows, columns = matching
    if not monotone and not is_whole(problem):
        # Of the matchings within the least threshold it is the whole fleet's.
        edges, threshold = edges_of(problem), near_s[matching].max()
        rows = any_matching(latency_s(edges) <= threshold, edges.demand)
    return edges.devices[rows], edges.blocks[columns]


def bottleneck_matching(edges: Edges, latency_s: Float64Array) -> Matching | None:
    """Find the matching whose largest latency is smallest; None if there is none.

    Parameters
    ----------
    edges
        The round's graph.
    latency_s
        Latency of each edge, seconds, shape (k, n); infinite where there is none.

    Returns
    -------
    Rows and columns of the active devices.

    Notes
    -----
    A threshold is achievable if the edges within it hold a matching; the smallest
    achievable one is some edge's latency, found by binary search over the sorted
    latencies. With monotone latencies each test is CRUNCH's count, O(k n log(k n)) in
    all; otherwise it is a Hopcroft-Karp matching.
    """
    candidates = np.unique(latency_s[np.isfinite(latency_s)])
    if edges.all_devices:
        # Nobody may idle, so the round lasts at least until everyone's fastest edge.
        slowest = latency_s.min(axis=1).max()
        candidates = candidates[candidates >= slowest]
    achievable, read_off = _threshold_test(latency_s, edges.demand)
    if candidates.size == 0 or not achievable(candidates[-1]):
        return None
    low, high = 0, candidates.size - 1  # candidates[high] is achievable throughout
    while low < high:
        middle = (low + high) // 2
        if achievable(candidates[middle]):
            high = middle
        else:
            low = middle + 1
    device_of_slot = read_off(candidates[high])
    slots = slots_of(edges.demand)
    if not edges.all_devices:
        return device_of_slot, slots
    columns = latency_s.argmin(axis=1)
    columns[device_of_slot] = slots
    return np.arange(columns.size), columns


def is_monotone(latency_s: Float64Array) -> bool:
    """Whether no device is faster on a deeper block, shape (k, n), deepest first.

    An infinite latency means no edge, so this also says that a device which can hold a
    block can hold every shallower one.
    """
    return bool(np.all(latency_s[:, :-1] >= latency_s[:, 1:]))


def _threshold_test(
    latency_s: Float64Array, demand: IntArray
) -> tuple[Callable[[float], bool], Callable[[float], IntArray]]:
    """Test of a threshold, and the matching (device of each slot) that it allows."""
    if not is_monotone(latency_s):

        def has_matching(threshold: float) -> bool:
            return bool(np.all(any_matching(latency_s <= threshold, demand) >= 0))

        def matching(threshold: float) -> IntArray:
            return any_matching(latency_s <= threshold, demand)

        return has_matching, matching

    # Devices wanted at this depth or deeper: blocks are ordered deepest first.
    wanted = np.cumsum(demand)

    def passes(threshold: float) -> bool:
        # Cutting: by monotonicity what is left of a device is all blocks up to its
        # reach, so recounting is a column sum. Checking (Proposition 1): the blocks at
        # a depth or deeper can only go to the devices that reach that depth, and these
        # sets are nested, so Hall's condition is just these inequalities.
        reaching = np.count_nonzero(latency_s <= threshold, axis=0)
        return bool(np.all(reaching >= wanted))

    def deepest_first(threshold: float) -> IntArray:
        # Whoever reaches a block reaches all shallower ones, so any choice leaves
        # enough devices for the rest; the fastest is the one to gain from best shares.
        free_s = np.where(latency_s <= threshold, latency_s, np.inf)
        device_of_slot = np.empty(int(wanted[-1]), dtype=np.int64)
        for slot, column in enumerate(slots_of(demand)):
            device = int(np.argmin(free_s[:, column]))
            device_of_slot[slot] = device
            free_s[device] = np.inf
        return device_of_slot

    return passes, deepest_first
