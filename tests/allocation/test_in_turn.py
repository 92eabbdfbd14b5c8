"""Uploads in turn: the best matching, against all matchings in all orders."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from lola_flwr.allocation import InfeasibleAllocation, allocate
from lola_flwr.allocation.edges import edges_of
from lola_flwr.allocation.in_turn import (
    _by_budgets,
    _round_s,
    _useful,
    round_in_turn_s,
    turns_s,
)
from tests.allocation.allocation_oracle import (
    all_modes,
    fleet_problem,
    matchings,
    random_problem,
)
from tests.marks import rest_slow

SIZES = [(3, 2), (4, 3), (5, 3), (7, 2)]


def last_end_s(compute_s, upload_s, order):
    """When the last upload has ended, one after the other in some order."""
    free_s = 0.0
    for device in order:
        free_s = max(free_s, compute_s[device]) + upload_s[device]
    return free_s


def least_s(problem):
    """Least latency over all matchings and orders; inf without any."""
    best_s = np.inf
    for devices, blocks in zip(*matchings(problem), strict=True):
        c, tau = (
            problem.compute_s[devices, blocks],
            problem.full_band_upload_s[devices, blocks],
        )
        sending = np.flatnonzero(tau)
        # That this order is the best shows with few of them.
        orders = [sending[np.argsort(c[sending])]]
        if sending.size <= 4:
            orders = itertools.permutations(sending)
        last_s = min(last_end_s(c, tau, order) for order in orders)
        best_s = min(best_s, max(last_s, c.max()))
    return problem.constant_s + best_s


@pytest.mark.parametrize("seed", rest_slow(range(300), fast=40))
def test_is_the_best_of_all_matchings_and_orders(seed):
    rng = np.random.default_rng(seed)
    sizes = SIZES[seed % len(SIZES)]
    modes = all_modes(rng, *sizes)
    mode = modes[[*modes][seed // 4 % len(modes)]]
    problem = replace(random_problem(rng, *sizes, mode=mode), in_turn=True)
    expected_s = least_s(problem)
    if np.isinf(expected_s):
        with pytest.raises(InfeasibleAllocation):
            allocate(problem)
        return
    found = allocate(problem)
    found.check(problem)
    assert found.round_s == pytest.approx(expected_s, rel=3e-6)
    assert found.stop_reason == "optimal"
    assert found.bound_s <= expected_s * (1 + 1e-12)
    assert found.gap <= 3e-6
    shared = allocate(replace(problem, in_turn=False))
    assert found.round_s <= shared.round_s * (1 + 1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_pairs_are_left_out_only_where_others_do_as_well(seed):
    rng = np.random.default_rng(seed)
    problem = random_problem(rng, 14, 2)
    edges, slots = edges_of(problem), 2
    kept = _useful(edges, np.inf)
    for column in range(2):
        compute_s = edges.compute_s[:, column]
        upload_s = edges.full_band_upload_s[:, column]
        possible = edges.possible[:, column]
        for row in np.flatnonzero(possible & ~kept[:, column]):
            as_quick = (compute_s <= compute_s[row]) & (upload_s <= upload_s[row])
            as_quick[row] = False
            assert (as_quick & possible).sum() >= slots
    assert kept.sum() < edges.possible.sum()


@pytest.mark.parametrize("seed", range(30))
def test_the_bound_by_budgets_holds(seed):
    rng = np.random.default_rng(seed)
    problem = replace(random_problem(rng, 5, 3), in_turn=True)
    some = matchings(problem)
    if not some[0].size:
        return
    worst = max(zip(*some, strict=True), key=lambda pairs: _round_s(problem, pairs))
    least = least_s(problem) - problem.constant_s
    best, low_s = _by_budgets(problem, edges_of(problem), worst)
    assert least * (1 - 1e-12) <= _round_s(problem, best)
    if least < _round_s(problem, worst):
        assert low_s <= least * (1 + 1e-12)


def test_who_has_computed_first_is_first():
    compute_s, upload_s = np.array([3.0, 0.0, 1.0, 9.0]), np.array([2.0, 2.0, 0.0, 1.0])
    assert turns_s(compute_s, upload_s).tolist() == [0.0, 0.0, 0.0, 0.0]
    upload_s[1] = 4.0
    assert turns_s(compute_s, upload_s).tolist() == [1.0, 0.0, 0.0, 0.0]
    assert round_in_turn_s(compute_s, upload_s) == 10.0
    upload_s[0] = 8.0
    assert turns_s(compute_s, upload_s).tolist() == [1.0, 0.0, 0.0, 3.0]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_large_fleets_end_in_time_near_the_bound(seed):
    problem = replace(fleet_problem(np.random.default_rng(seed), 200, 24), in_turn=True)
    found = allocate(problem)
    found.check(problem)
    assert found.stop_reason in ("optimal", "time")
    assert found.gap < 0.05
    assert found.round_s <= allocate(replace(problem, in_turn=False)).round_s
