from dataclasses import replace

import numpy as np
import pytest
from allocation_oracle import fleet_problem, random_problem

from lola_flwr.allocation import (
    ALLOCATORS,
    AllocationProblem,
    RoundMode,
    allocate,
)
from lola_flwr.allocation.shares import with_equal_shares


@pytest.fixture
def problem():
    return fleet_problem(np.random.default_rng(51), 10, 4)


def with_mode(problem, **fields):
    return replace(problem, mode=RoundMode(**fields))


class TestDispatch:
    def test_exact_is_the_default(self, problem):
        assert allocate(problem).round_s == allocate(problem, "exact").round_s

    def test_unknown_name_lists_the_names_and_suggests_one(self, problem):
        with pytest.raises(ValueError, match=r"exact, jbba.*Did you mean 'crunch'"):
            allocate(problem, "crnch")

    def test_any_function_of_a_problem_will_do(self, problem):
        def diagonal(problem, *, first=0):
            blocks = np.arange(problem.num_blocks)
            return with_equal_shares(problem, blocks + first, blocks)

        allocation = allocate(problem, diagonal, first=3)
        assert allocation.device_of_block.tolist() == [3, 4, 5, 6]

    def test_a_wrong_answer_of_a_function_is_refused(self, problem):
        def lazy(problem):
            return with_equal_shares(problem, np.array([0]), np.array([0]))

        with pytest.raises(ValueError, match="Block 1 has 0 devices"):
            allocate(problem, lazy)

    def test_options_reach_the_allocator(self, problem):
        first, second = (allocate(problem, "random", seed=s) for s in (1, 2))
        again = allocate(problem, "random", seed=1)
        assert first.block_of_device.tolist() == again.block_of_device.tolist()
        assert first.block_of_device.tolist() != second.block_of_device.tolist()
        with pytest.raises(TypeError, match="seed"):
            allocate(problem, "exact", seed=1)

    @pytest.mark.parametrize("name", ALLOCATORS)
    def test_modes_are_honoured(self, problem, name):
        allocation = allocate(with_mode(problem, blocks=[3, 1]), name)
        assert (allocation.device_of_block >= 0).tolist() == [False, True, False, True]
        both = RoundMode(blocks=[1, 3], devices_per_block=2)
        doubled = AllocationProblem(
            problem.compute_s, problem.full_band_upload_s, mode=both
        )
        allocate(doubled, name).check(doubled)
        everyone = allocate(with_mode(problem, participation="all"), name)
        assert np.all(everyone.block_of_device >= 0)


class TestBackups:
    def backed_up(self, problem, backups, name="exact"):
        given = with_mode(problem, backups=backups)
        allocation = allocate(given, name)
        allocation.check(given)
        return np.bincount(allocation.block_of_device + 1, minlength=5)[1:]

    @pytest.mark.parametrize("name", ALLOCATORS)
    def test_one_more_device_for_that_many_blocks(self, problem, name):
        assert sorted(self.backed_up(problem, 2, name)) == [1, 1, 2, 2]

    def test_the_block_that_takes_most_band_is_backed_up(self, problem):
        alone = allocate(problem)
        hardest = alone.block_of_device[np.argmax(alone.share)]
        assert self.backed_up(problem, 1)[hardest] == 2

    def test_no_more_than_there_are_spare_devices(self, problem):
        few = AllocationProblem(problem.compute_s[:5], problem.full_band_upload_s[:5])
        assert self.backed_up(few, 3).sum() == 5

    def test_none_where_nobody_else_can_hold_the_block(self, problem):
        feasible = np.zeros((10, 4), dtype=bool)
        feasible[:4] = np.eye(4, dtype=bool)
        feasible[4:, 2] = True
        only = AllocationProblem(
            problem.compute_s, problem.full_band_upload_s, feasible
        )
        assert self.backed_up(only, 3).tolist() == [1, 1, 2, 1]

    def test_round_waits_for_the_backups(self, problem):
        # A subset of the devices in a backed-up round is a round of its own.
        backed_up = allocate(with_mode(problem, backups=2))
        assert backed_up.round_s >= allocate(problem).round_s


class TestBaselines:
    def test_greedy_gives_the_fastest_device_the_deepest_block(self):
        # Device 2 is fastest and holds all; 0 is next but holds only the last block.
        problem = AllocationProblem(
            [[4.0, 2.0], [6.0, 3.0], [2.0, 1.0]],
            np.ones((3, 2)),
            [[False, True], [True, True], [True, True]],
        )
        assert allocate(problem, "greedy").device_of_block.tolist() == [2, 0]

    def test_greedy_changes_little_where_it_would_leave_a_block_open(self):
        # The fastest device takes block 0, the only one that device 1 holds.
        problem = AllocationProblem(
            [[1.0, 1.0], [2.0, 2.0]], np.ones((2, 2)), [[True, True], [True, False]]
        )
        assert allocate(problem, "greedy").device_of_block.tolist() == [1, 0]

    def test_random_is_uniform_where_everything_is_possible(self):
        problem = AllocationProblem(np.ones((3, 2)), np.ones((3, 2)))
        drawn = [
            tuple(allocate(problem, "random", seed=seed).device_of_block)
            for seed in range(1200)
        ]
        counts = [drawn.count(pair) for pair in set(drawn)]
        # 6 matchings, 200 expected each; 4 standard deviations are 52.
        assert len(counts) == 6 and min(counts) > 148 and max(counts) < 252

    def test_shares_help_the_random_matching_too(self):
        rng = np.random.default_rng(52)
        for seed in range(20):
            problem = random_problem(rng, 8, 2)
            equal, best = (
                allocate(problem, name, seed=seed)
                for name in ("random", "random+shares")
            )
            assert equal.block_of_device.tolist() == best.block_of_device.tolist()
            assert best.round_s <= equal.round_s * (1 + 1e-12)
