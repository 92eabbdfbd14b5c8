from dataclasses import replace

import numpy as np
import pytest
from allocation_oracle import random_problem

from lola_flwr.allocation import (
    AllocationProblem,
    InfeasibleAllocation,
    RoundMode,
    allocate,
)


def test_greedy_gives_the_fastest_device_the_deepest_block():
    # Device 2 is fastest and holds all; 0 is next but holds only the last block.
    problem = AllocationProblem(
        [[4.0, 2.0], [6.0, 3.0], [2.0, 1.0]],
        np.ones((3, 2)),
        [[False, True], [True, True], [True, True]],
    )
    assert allocate(problem, "greedy").device_of_block.tolist() == [2, 0]


def test_greedy_changes_little_where_it_would_leave_a_block_open():
    # The fastest device takes block 0, the only one that device 1 holds.
    problem = AllocationProblem(
        [[1.0, 1.0], [2.0, 2.0]], np.ones((2, 2)), [[True, True], [True, False]]
    )
    assert allocate(problem, "greedy").device_of_block.tolist() == [1, 0]


def test_random_is_uniform_where_everything_is_possible():
    problem = AllocationProblem(np.ones((3, 2)), np.ones((3, 2)))
    drawn = [
        tuple(allocate(problem, "random", seed=seed).device_of_block)
        for seed in range(1200)
    ]
    counts = [drawn.count(pair) for pair in set(drawn)]
    # 6 matchings, 200 expected each; 4 standard deviations are 52.
    assert len(counts) == 6 and min(counts) > 148 and max(counts) < 252


def test_shares_help_the_random_matching_too():
    rng = np.random.default_rng(52)
    for seed in range(20):
        problem = random_problem(rng, 8, 2)
        equal, best = (
            allocate(problem, name, seed=seed) for name in ("random", "random+shares")
        )
        assert equal.block_of_device.tolist() == best.block_of_device.tolist()
        assert best.round_s <= equal.round_s * (1 + 1e-12)


def greedy_by_the_book(problem):
    """What the docstring says, step by step; None if a block is left open."""
    still_open = problem.demand.tolist()
    block_of_device = np.full(problem.num_devices, -1)
    fastest_s = np.where(problem.feasible, problem.compute_s, np.inf).min(axis=1)
    for device in sorted(range(problem.num_devices), key=lambda d: fastest_s[d]):
        can = [b for b in range(problem.num_blocks) if problem.feasible[device, b]]
        takes = [b for b in can if still_open[b] > 0]
        if takes:
            still_open[takes[0]] -= 1
            block_of_device[device] = takes[0]
        elif problem.all_devices and can:
            block_of_device[device] = can[0]
    return None if any(still_open) else block_of_device


@pytest.mark.parametrize(
    "mode",
    [
        RoundMode(),
        RoundMode(devices_per_block=2),
        RoundMode(participation="all"),
        RoundMode(devices_per_block=2, participation="all"),
    ],
    ids=str,
)
def test_greedy_is_greedy_where_that_leaves_no_block_open(mode):
    rng = np.random.default_rng(53)
    seen = 0
    for i in range(120):
        problem = random_problem(rng, 30 if i % 4 == 0 else 7, 3, mode=mode)
        if i % 3 == 0:  # every other device is as fast as those between
            every_other = 1.0 + np.arange(problem.num_devices)[:, np.newaxis] % 2
            compute_s = every_other * np.ones(problem.compute_s.shape)
            problem = replace(problem, compute_s=compute_s)
        expected = greedy_by_the_book(problem)
        if expected is None or (mode.participation == "all" and -1 in expected):
            continue
        seen += 1
        found = allocate(problem, "greedy").block_of_device
        assert found.tolist() == expected.tolist()
    assert seen > 30


def test_the_draw_is_that_of_seed_0_by_default():
    problem = AllocationProblem(np.ones((9, 4)), np.ones((9, 4)))
    for name in ("random", "random+shares"):
        drawn = allocate(problem, name).block_of_device.tolist()
        assert drawn == allocate(problem, name, seed=0).block_of_device.tolist()
        assert drawn != allocate(problem, name, seed=1).block_of_device.tolist()


@pytest.mark.parametrize("name", ["random", "random+shares", "greedy"])
def test_everybody_takes_part_or_the_error_says_why_not(name):
    everyone = RoundMode(participation="all")
    problem = AllocationProblem(np.ones((5, 2)), np.ones((5, 2)), mode=everyone)
    assert np.all(allocate(problem, name).block_of_device >= 0)
    few = AllocationProblem(np.ones((1, 2)), np.ones((1, 2)))
    with pytest.raises(InfeasibleAllocation, match="Too few devices: 1 for 2 blocks"):
        allocate(few, name)
