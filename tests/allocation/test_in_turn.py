"""Uploads in turn: the best matching, against all matchings in all orders."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from lola_flwr.allocation import AllocationProblem, InfeasibleAllocation, allocate
from lola_flwr.allocation.in_turn import round_in_turn_s, turns_s
from tests.allocation.allocation_oracle import all_modes, matchings, random_problem
from tests.marks import rest_slow

SIZES = [(3, 2), (4, 3), (5, 3), (5, 2)]


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


def test_who_has_computed_first_is_first():
    compute_s, upload_s = np.array([3.0, 0.0, 1.0, 9.0]), np.array([2.0, 2.0, 0.0, 1.0])
    assert turns_s(compute_s, upload_s).tolist() == [0.0, 0.0, 0.0, 0.0]
    upload_s[1] = 4.0
    assert turns_s(compute_s, upload_s).tolist() == [1.0, 0.0, 0.0, 0.0]
    assert round_in_turn_s(compute_s, upload_s) == 10.0
    upload_s[0] = 8.0
    assert turns_s(compute_s, upload_s).tolist() == [1.0, 0.0, 0.0, 3.0]


@pytest.mark.slow
def test_large_fleets_end_in_time_with_a_bound():
    rng = np.random.default_rng(0)
    problem = AllocationProblem(
        rng.exponential(size=(300, 1)) * np.arange(20, 8, -1) / 8,
        rng.exponential(size=(300, 1)) * np.ones(12),
        in_turn=True,
    )
    found = allocate(problem)
    found.check(problem)
    assert found.stop_reason in ("optimal", "time")
    assert found.gap < 0.05
    assert found.round_s <= allocate(replace(problem, in_turn=False)).round_s
