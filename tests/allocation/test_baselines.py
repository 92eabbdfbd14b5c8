import numpy as np
from allocation_oracle import random_problem

from lola_flwr.allocation import AllocationProblem, allocate


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
