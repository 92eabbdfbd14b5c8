"""Simple allocators to compare with: random and greedy matchings."""

from __future__ import annotations

import numpy as np

from lola_flwr.allocation.edges import Edges, edges_of
from lola_flwr.allocation.infeasible import explain_infeasible
from lola_flwr.allocation.matching import Matching, cheapest_matching
from lola_flwr.allocation.problem import AllocationProblem
from lola_flwr.allocation.shares import with_best_shares, with_equal_shares
from lola_flwr.allocation.solution import Allocation
from lola_flwr.arrays import Float64Array


def solve_random(problem: AllocationProblem, *, seed: int = 0) -> Allocation:
    """Draw a feasible matching at random; equal shares.

    Parameters
    ----------
    problem
        The instance.
    seed
        Seed of the draw; the same seed and problem give the same matching.

    Raises
    ------
    InfeasibleAllocation
        If no matching exists; says why.
    """
    return with_equal_shares(problem, *_random_matching(problem, seed))


def solve_random_with_shares(
    problem: AllocationProblem, *, seed: int = 0
) -> Allocation:
    """Give the matching of `solve_random` the shares that are best for it.

    Parameters and errors are those of `solve_random`.
    """
    return with_best_shares(problem, *_random_matching(problem, seed))


def solve_greedy(problem: AllocationProblem) -> Allocation:
    """Let the fastest device go first, and each take the deepest block it can hold.

    Equal shares. A device's speed is judged by its fastest block. Where the devices
    can hold nested sets of blocks this always covers them all; otherwise it may leave
    a block open, and then as few choices as possible are changed.

    Parameters
    ----------
    problem
        The instance.

    Raises
    ------
    InfeasibleAllocation
        If no matching exists; says why.
    """
    edges = edges_of(problem)
    possible = edges.possible
    chosen = np.zeros_like(possible)
    still_open = edges.demand.copy()
    for row in np.argsort(edges.compute_s.min(axis=1), kind="stable"):
        if not (edges.all_devices or still_open.any()):
            break
        takes = np.flatnonzero(possible[row] & (still_open > 0))
        if takes.size:
            chosen[row, takes[0]] = True  # columns are ordered deepest first
            still_open[takes[0]] -= 1
        elif edges.all_devices and possible[row].any():
            chosen[row, np.argmax(possible[row])] = True
    if not still_open.any() and (chosen.any(axis=1).all() or not edges.all_devices):
        rows, columns = np.nonzero(chosen)
        return with_equal_shares(problem, edges.devices[rows], edges.blocks[columns])
    # A greedy choice is free, any other edge costs 1: the cheapest matching is the one
    # nearest to the greedy one, which left a block open.
    changed = np.where(chosen, 0.0, 1.0)
    matching = _cheapest_possible(problem, edges, changed)
    return with_equal_shares(problem, *matching)


def _random_matching(problem: AllocationProblem, seed: int) -> Matching:
    """Cheapest matching under random costs: uniform if every edge is possible."""
    edges = edges_of(problem)
    cost = np.random.default_rng(seed).random(edges.compute_s.shape)
    return _cheapest_possible(problem, edges, cost)


def _cheapest_possible(
    problem: AllocationProblem, edges: Edges, cost: Float64Array
) -> Matching:
    """Devices and blocks of the cheapest matching within the possible edges."""
    found = cheapest_matching(
        np.where(edges.possible, cost, np.inf),
        edges.demand,
        all_devices=edges.all_devices,
    )
    if found is None:
        raise explain_infeasible(problem)
    (rows, columns), _ = found
    return edges.devices[rows], edges.blocks[columns]
