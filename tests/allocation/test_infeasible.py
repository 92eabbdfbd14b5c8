from dataclasses import replace

import numpy as np
import pytest
from allocation_oracle import matchings, random_problem

from lola_flwr.allocation import (
    ALLOCATORS,
    AllocationProblem,
    InfeasibleAllocation,
    RoundMode,
    allocate,
)
from lola_flwr.allocation.infeasible import explain_infeasible, is_feasible


def problem(feasible, **fields):
    feasible = np.array(feasible, dtype=bool)
    ones = np.ones(feasible.shape)
    return AllocationProblem(ones, ones, feasible, **fields)


@pytest.mark.parametrize("name", ALLOCATORS)
class TestEveryAllocatorSaysWhy:
    def test_too_few_devices(self, name):
        with pytest.raises(InfeasibleAllocation, match="Too few devices: 2 for 3 bl"):
            allocate(problem(np.ones((2, 3))), name)

    def test_block_that_nobody_can_hold(self, name):
        impossible = problem(
            [[0, 1], [0, 1], [0, 1]],
            memory_bytes=[3e8, 6.4e8, 1e8],
            required_memory_bytes=[8.12e8, 1e7],
        )
        with pytest.raises(
            InfeasibleAllocation,
            match="block 0: required_memory_bytes=812000000 B, largest "
            r"memory_bytes=640000000 B \(device 1\)",
        ):
            allocate(impossible, name)

    def test_set_of_blocks_with_too_few_devices(self, name):
        impossible = problem([[0, 0, 1], [0, 0, 1], [0, 0, 1], [1, 1, 1]])
        with pytest.raises(
            InfeasibleAllocation,
            match="Blocks 0, 1 need 2 devices, but only device 3 can hold them",
        ):
            allocate(impossible, name)


class TestMessages:
    def test_infinite_latency_is_not_called_memory(self):
        impossible = AllocationProblem([[np.inf, 1.0]] * 2, np.ones((2, 2)))
        with pytest.raises(InfeasibleAllocation, match="the latency is infinite"):
            allocate(impossible)

    def test_enough_memory_but_infeasible_anyway(self):
        impossible = problem(
            [[0, 1], [0, 1]], memory_bytes=[9, 9], required_memory_bytes=[5, 5]
        )
        with pytest.raises(InfeasibleAllocation, match="feasible is False"):
            allocate(impossible)

    def test_several_devices_per_block(self):
        with pytest.raises(InfeasibleAllocation, match="2 blocks that need 6 devices"):
            allocate(problem(np.ones((5, 2)), mode=RoundMode(devices_per_block=3)))
        with pytest.raises(InfeasibleAllocation, match="Block 0 needs 2 devices"):
            allocate(
                problem(
                    [[1, 1], [0, 1], [0, 1], [0, 1]],
                    mode=RoundMode(devices_per_block=2),
                )
            )

    def test_device_without_a_block_when_all_take_part(self):
        given = problem([[1, 1], [1, 1], [0, 0]])
        assert allocate(given).device_of_block.tolist() == [0, 1]
        with pytest.raises(InfeasibleAllocation, match="Device 2 can compute no block"):
            allocate(replace(given, mode=RoundMode(participation="all")))

    def test_as_many_bytes_as_are_needed_are_enough(self):
        impossible = problem([[0]], memory_bytes=[5], required_memory_bytes=[5])
        with pytest.raises(InfeasibleAllocation, match="feasible is False"):
            allocate(impossible)

    @pytest.mark.parametrize(
        ("devices_per_block", "message"),
        [
            (1, "Too few devices: 2 for 3 blocks. Add devices, or train at most 2 blo"),
            (
                2,
                "Too few devices: 2 for 3 blocks that need 6 devices. Add devices, or ",
            ),
        ],
    )
    def test_the_remedy_is_what_was_asked_too_much_of(self, devices_per_block, message):
        mode = RoundMode(devices_per_block=devices_per_block)
        told = str(explain_infeasible(problem(np.ones((2, 3)), mode=mode)))
        assert told.startswith(message)
        assert told.endswith("lower devices_per_block.") == (devices_per_block > 1)

    def test_a_lack_elsewhere_is_another_matter(self):
        # Device 3 alone can hold blocks 0 and 1, device 0 alone blocks 2 and 3.
        feasible = np.zeros((4, 4), dtype=bool)
        feasible[3, :2], feasible[0, 2:] = True, True
        told = str(explain_infeasible(problem(feasible)))
        assert told.startswith(
            "Blocks 0, 1 need 2 devices, but only device 3 can hold them. "
        )

    @pytest.mark.parametrize(("num_blocks", "end"), [(8, "6, 7"), (9, "7 and 1 more")])
    def test_lists_of_eight_are_not_cut(self, num_blocks, end):
        feasible = np.zeros((20, num_blocks), dtype=bool)
        feasible[: num_blocks - 1] = True
        told = str(explain_infeasible(problem(feasible)))
        assert f"{end} need {num_blocks} devices, but only devices 0, 1, " in told

    def test_long_lists_are_cut(self):
        feasible = np.zeros((20, 12), dtype=bool)
        feasible[:10, :11], feasible[:, 11] = True, True
        with pytest.raises(InfeasibleAllocation, match="6, 7 and 3 more need 11"):
            allocate(problem(feasible))

    def test_nothing_to_explain(self):
        with pytest.raises(ValueError, match="has a solution"):
            explain_infeasible(problem([[1]]))

    def test_the_named_blocks_do_lack_devices(self):
        # Hall: the blocks named need more devices than can compute any of them.
        rng = np.random.default_rng(41)
        seen = 0
        for _ in range(400):
            given = problem(rng.random((6, 4)) < 0.35)
            if matchings(given)[0].size:
                continue
            message = str(explain_infeasible(given))
            if not message.startswith("Block"):
                continue
            seen += 1
            words = message.split(" need", 1)[0].split(" ", 1)[1]
            blocks = [int(word) for word in words.split(", ")]
            able = given.feasible[:, blocks].any(axis=1).sum()
            assert able < len(blocks)
        assert seen > 20


def test_all_allocators_agree_on_feasibility():
    rng = np.random.default_rng(42)
    modes = [RoundMode(), RoundMode(devices_per_block=2), RoundMode((0,), 1, "all")]
    for i in range(90):
        given = random_problem(rng, int(rng.integers(1, 7)), 2, mode=modes[i % 3])
        feasible = matchings(given)[0].size > 0
        for name in ALLOCATORS:
            if feasible:
                allocate(given, name).check(given)
            else:
                with pytest.raises(InfeasibleAllocation):
                    allocate(given, name)


def test_feasible_is_what_any_matching_solves():
    rng = np.random.default_rng(43)
    modes = [
        RoundMode(),
        RoundMode(devices_per_block=2),
        RoundMode((0,), 1, "all"),
        RoundMode(participation="all"),
    ]
    seen = []
    for i in range(200):
        given = random_problem(rng, int(rng.integers(1, 6)), 2, mode=modes[i % 4])
        expected = matchings(given)[0].size > 0
        assert is_feasible(given) is expected
        seen.append(expected)
    assert 50 < sum(seen) < 150
