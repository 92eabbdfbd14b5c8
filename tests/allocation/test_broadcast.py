"""Rounds that begin with a broadcast: who hears it is decided with the rest."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest

from lola_flwr.allocation import (
    AllocationProblem,
    Broadcast,
    InfeasibleAllocation,
    RoundMode,
    allocate,
    allocate_broadcast,
    rotate,
    settled,
)
from lola_flwr.allocation.shares import with_best_shares
from tests.marks import rest_slow


def instance(rng, num_devices, num_blocks, *, levels=1, with_own=False):
    """Return a random problem, and a broadcast that takes as long as the rest."""
    compute_s = rng.uniform(0.1, 5.0, (num_devices, num_blocks))
    upload_s = rng.uniform(0.1, 3.0, (num_devices, 1)) * np.ones(num_blocks)
    problem = AllocationProblem(
        compute_s,
        upload_s,
        rng.random((num_devices, num_blocks)) < 0.8,
        constant_s=0.25,
    )
    rate_bps = rng.exponential(size=num_devices)
    if with_own:
        rate_bps[rng.integers(num_devices)] = math.inf
    bits = rng.choice([1.0, 3.0, 4.0][:levels], num_devices)
    return problem, Broadcast(bits, rate_bps)


def brute_force(problem, broadcast):
    """Return the shortest round over all matchings, each with its own wait."""
    best_s = math.inf
    blocks = np.flatnonzero(problem.demand)
    for devices in permutations(range(problem.num_devices), blocks.size):
        rows = np.array(devices)
        if problem.feasible[rows, blocks].all():
            waiting = broadcast.waiting(problem, broadcast.wait_s(rows))
            best_s = min(best_s, with_best_shares(waiting, rows, blocks).round_s)
    return best_s


@pytest.mark.parametrize("levels", rest_slow([3, 1]))
def test_it_is_the_best_of_all_matchings_with_their_own_waits(levels):
    rng = np.random.default_rng(levels)
    found = 0
    for number in range(60):
        num_devices = int(rng.integers(2, 6))
        num_blocks = int(rng.integers(1, min(num_devices, 3) + 1))
        problem, broadcast = instance(
            rng, num_devices, num_blocks, levels=levels, with_own=number % 2 == 0
        )
        expected_s = brute_force(problem, broadcast)
        if math.isinf(expected_s):
            with pytest.raises(InfeasibleAllocation):
                allocate_broadcast(problem, broadcast)
            continue
        found += 1
        heard = allocate_broadcast(problem, broadcast)
        heard.allocation.check(heard.problem)
        assert heard.allocation.round_s == pytest.approx(expected_s, rel=1e-9)
        assert heard.allocation.bound_s == heard.allocation.round_s
        active = np.flatnonzero(heard.allocation.block_of_device >= 0)
        assert heard.wait_s == broadcast.wait_s(active)
    assert found > 30


def test_a_fast_device_in_a_deep_fade_is_left_out():
    # It would end first, were it not for the model's way down.
    problem = AllocationProblem(np.array([[0.1], [1.0]]), np.array([[0.1], [1.0]]))
    rate_bps = np.array([0.01, 10.0])
    heard = allocate_broadcast(problem, Broadcast(np.ones(2), rate_bps))
    assert heard.allocation.block_of_device.tolist() == [-1, 0]
    assert heard.wait_s == 0.1
    assert heard.allocation.round_s == pytest.approx(2.1)
    assert not heard.problem.feasible[0, 0], "it has nothing when the round begins"


def test_devices_that_do_not_wait_begin_at_once():
    problem = AllocationProblem(np.array([[1.0], [1.0]]), np.array([[1.0], [1.0]]))
    broadcast = Broadcast(np.ones(2), np.array([1.0, math.inf]))
    heard = allocate_broadcast(problem, broadcast)
    assert heard.allocation.block_of_device.tolist() == [-1, 0]
    assert (heard.wait_s, heard.allocation.round_s) == (0.0, pytest.approx(2.0))
    alone = Broadcast(np.ones(2), np.full(2, math.inf))
    heard = allocate_broadcast(problem, alone)
    plain = allocate(problem)
    assert heard.allocation.round_s == plain.round_s
    assert heard.wait_s == 0.0


def test_others_allocate_for_all_and_then_wait_for_those_who_came():
    rng = np.random.default_rng(3)
    problem, broadcast = instance(rng, 8, 3)
    problem = replace(problem, feasible=np.ones((8, 3), bool))
    best = allocate_broadcast(problem, broadcast).allocation.round_s
    for name in ("jbba", "crunch", "greedy", "random"):
        options = {"seed": 1} if name == "random" else {}
        heard = allocate_broadcast(problem, broadcast, name, **options)
        assert heard.wait_s == broadcast.wait_s(np.arange(8))
        alike = allocate(problem, name, **options).block_of_device
        assert (heard.allocation.block_of_device == alike).all()
        heard = settled(heard, broadcast)
        heard.allocation.check(heard.problem)
        active = np.flatnonzero(heard.allocation.block_of_device >= 0)
        assert heard.wait_s == broadcast.wait_s(active)
        assert heard.allocation.round_s >= best * (1 - 1e-9)
        if name == "jbba":
            assert heard.allocation.bound_s <= best * (1 + 1e-9)


def test_where_all_take_part_all_are_waited_for():
    rng = np.random.default_rng(4)
    problem, broadcast = instance(rng, 4, 2)
    mode = RoundMode(participation="all")
    problem = replace(problem, feasible=np.ones((4, 2), bool), mode=mode)
    heard = allocate_broadcast(problem, broadcast)
    assert heard.wait_s == broadcast.wait_s(np.arange(4))
    plain_s = allocate(problem).round_s
    assert heard.allocation.round_s == pytest.approx(plain_s + heard.wait_s)
    assert heard.allocation.bound_s == heard.allocation.round_s


def test_rotation_stays_among_those_who_hear():
    rng = np.random.default_rng(5)
    problem, broadcast = instance(rng, 8, 3)
    problem = replace(problem, feasible=np.ones((8, 3), bool))
    heard = allocate_broadcast(problem, broadcast)
    meetings = np.zeros((8, 3))
    active = np.flatnonzero(heard.allocation.block_of_device >= 0)
    meetings[active, heard.allocation.block_of_device[active]] = 9
    turned = rotate(heard.problem, heard.allocation, meetings, eps=5.0)
    assert (turned.block_of_device != heard.allocation.block_of_device).any()
    after = settled(heard._replace(allocation=turned), broadcast)
    after.allocation.check(after.problem)
    active = np.flatnonzero(after.allocation.block_of_device >= 0)
    assert broadcast.wait_s(active) == after.wait_s <= heard.wait_s


def test_few_problems_are_solved_in_a_large_fleet(monkeypatch):
    import lola_flwr.allocation.broadcast as module

    solved = []

    def counted(problem, *args, **options):
        solved.append(problem)
        return allocate(problem, *args, **options)

    monkeypatch.setattr(module, "allocate", counted)
    rng = np.random.default_rng(6)
    problem, broadcast = instance(rng, 300, 12)
    allocate_broadcast(problem, broadcast)
    assert 1 < len(solved) < 60
