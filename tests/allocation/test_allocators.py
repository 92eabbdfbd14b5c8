from dataclasses import replace

import numpy as np
import pytest
from allocation_oracle import fleet_problem

from lola_flwr.allocation import (
    ALLOCATORS,
    AllocationProblem,
    RoundMode,
    allocate,
    find_allocator,
)
from lola_flwr.allocation.shares import with_best_shares, with_equal_shares
from lola_flwr.errors import UserError


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

    def test_a_function_may_be_named(self):
        found = find_allocator("lola_flwr.allocation.baselines:solve_greedy")
        assert found is ALLOCATORS["greedy"]
        for name, message in (
            ("lola_flwr.allocation.baselines:solve", "cannot be imported: .*'solve'"),
            ("lola_flwr.allocation.none:solve", "cannot be imported: No module"),
            ("lola_flwr.allocation.allocators:ALLOCATORS", "is not a function"),
            ("greedly", "Did you mean 'greedy'"),
        ):
            with pytest.raises(UserError, match=message):
                find_allocator(name)


class Diagonal:
    """Give each block in turn the next devices; remember what was asked for."""

    def __init__(self):
        self.asked = []

    def __call__(self, problem, *, first=0):
        self.asked.append((problem.demand.tolist(), first))
        blocks = np.repeat(np.arange(problem.num_blocks), problem.demand)
        return with_best_shares(problem, first + np.arange(blocks.size), blocks)


class TestBackups:
    def asked(self, compute_s, upload_s, feasible=True, **mode):
        """What an allocator is asked for where blocks cost this, whoever does them."""
        num_devices, num_blocks = 12, len(compute_s)
        shape = (max(num_devices, 2 * num_blocks), num_blocks)
        problem = AllocationProblem(
            np.broadcast_to(compute_s, shape),
            np.broadcast_to(upload_s, shape),
            np.broadcast_to(feasible, shape),
            mode=RoundMode(**mode),
        )
        diagonal = Diagonal()
        allocate(problem, diagonal, first=1).check(problem)
        assert {first for _, first in diagonal.asked} == {1}
        return [demand for demand, _ in diagonal.asked]

    def test_blocks_are_backed_up_in_the_order_of_their_bands(self):
        # The longer a block computes, the less time its upload has.
        for backups, demand in ((1, [2, 1, 1]), (2, [2, 1, 2]), (3, [2, 2, 2])):
            asked = self.asked([3.0, 1.0, 2.0], 1.0, backups=backups)
            assert asked == [[1, 1, 1], demand]

    def test_among_equals_those_nearest_the_input_come_first(self):
        # Every other block is as hard as the others, and so are those between.
        asked = self.asked(1.0 + np.arange(40) % 2, 1.0, backups=23)
        assert asked[1] == [2, 2] * 3 + [1, 2] * 17

    def test_a_block_with_nothing_to_send_may_be_backed_up_one_left_out_may_not(self):
        asked = self.asked(np.ones(3), [1.0, 1.0, 0.0], blocks=[0, 2], backups=2)
        assert asked == [[1, 0, 1], [2, 0, 2]]

    def test_what_cannot_be_backed_up_keeps_its_devices(self):
        feasible = np.zeros((12, 2), dtype=bool)
        feasible[1:3, 0], feasible[3:, 1] = True, True
        asked = self.asked(
            [2.0, 1.0], 1.0, feasible, devices_per_block=[2, 1], backups=2
        )
        assert asked == [[2, 1], [2, 2]]

    def test_nothing_is_asked_twice(self):
        feasible = np.eye(13, 2, -1, dtype=bool)[:12]
        assert self.asked([2.0, 1.0], 1.0, feasible, backups=2) == [[1, 1]]

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
