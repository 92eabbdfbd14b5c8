"""Several devices for each block: windows of consecutive blocks."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lola_flwr.allocation import InfeasibleAllocation, RoundMode, progress
from lola_flwr.build import (
    AllocationOptions,
    DeviceOptions,
    RoundSettings,
    coordinator_for_weights,
)
from lola_flwr.errors import UserError
from lola_flwr.planning import planned_blocks, solve_round
from lola_flwr.planning.windows import even_windows
from lola_flwr.strategies.served import PROJECT_SETTINGS
from lola_flwr.system.devices import DeviceProfile
from tests.planning.test_batches import (
    COSTS,
    EVEN_NOISE,
    even_fleet,
    known,
    statement,
)


@given(st.integers(1, 40), st.data())
def test_each_block_is_in_about_as_many_windows(num_blocks, data):
    num_devices = data.draw(st.integers(1, 60))
    length = data.draw(st.integers(1, num_blocks))
    windows = even_windows(num_blocks, length, num_devices)
    assert len(windows) <= num_devices
    counts = Counter(block for window in windows.values() for block in window)
    if length == num_blocks:
        assert windows == {0: tuple(range(num_blocks))}
    for first, window in windows.items():
        assert window[0] == first and len({*window}) == length
        assert all((b - a) % num_blocks == 1 % num_blocks for a, b in pairwise(window))
    present = [counts[block] for block in range(num_blocks)]
    assert max(present) - min(present) <= 1


def coordinator_of(num_layers, returned_by, **options):
    layers = [nn.Sequential(nn.Linear(160, 160), nn.Tanh()) for _ in range(num_layers)]
    model = nn.Sequential(nn.Sequential(*layers), nn.Linear(160, 1))
    allocation = replace(PROJECT_SETTINGS.allocation, returned_by=returned_by)
    settings = RoundSettings(
        allocation=allocation, devices=DeviceOptions(train_all=True, **options)
    )
    return coordinator_for_weights(model, stack="0", batch_size=4, settings=settings)


def planned(coordinator, server_round, memory_bytes):
    devices = [str(index) for index in range(len(memory_bytes))]
    coordinator.meet_devices(server_round, devices)
    for index, memory in enumerate(memory_bytes):
        profile = DeviceProfile(str(index), 1e9, float(memory), 2.0 * index)
        coordinator.add_device(str(index), profile.to_properties())
    return coordinator.plan_round(server_round, devices)


@pytest.mark.parametrize(
    ("num_devices", "each", "length"),
    [(1, 1, 4), (2, 2, 4), (8, 8, 4), (9, 8, 4), (12, 9, 3), (16, 8, 2), (40, 10, 1)],
)
def test_a_fleet_of_any_size(num_devices, each, length):
    coordinator = coordinator_of(4, 8)
    assignments = planned(coordinator, 1, [1e9] * num_devices).assignments
    assert len(assignments) == num_devices
    assert {len(a.blocks) for a in assignments.values()} == {length}
    counts = Counter(block for a in assignments.values() for block in a.blocks)
    assert min(counts.values()) >= min(each, num_devices)
    assert len(counts) == 4
    for assignment in assignments.values():
        names = coordinator.partition.update_names(*assignment.blocks)
        assert assignment.update_names == "\n".join(names)


def test_a_fleet_that_grows_returns_less_each():
    coordinator = coordinator_of(4, 8)
    few = planned(coordinator, 1, [1e9] * 2).assignments
    many = planned(coordinator, 2, [1e9] * 20).assignments
    assert {len(a.blocks) for a in few.values()} == {4}
    assert {len(a.blocks) for a in many.values()} == {2}


def test_who_cannot_hold_a_window_trains_what_it_can():
    """A window that begins again at the first block takes as much as all blocks."""
    coordinator = coordinator_of(4, 8)
    plan = planned(coordinator_of(4, 8), 1, [1e9] * 8)
    (whole,) = {a.memory_bytes for a in plan.assignments.values()}
    memory_bytes = [1e9] * 15 + [whole - 1]
    assignments = planned(coordinator, 1, memory_bytes).assignments
    assert len(assignments) == 16
    small = assignments["15"]
    assert not small.trains_all
    assert small.memory_bytes <= whole - 1
    assert small.blocks == tuple(sorted(small.blocks))
    assert all(assignments[str(n)].trains_all for n in range(15))


@pytest.mark.parametrize("num_small", [0, 2, 5])
def test_who_can_hold_nothing_does_not_keep_others_from_several_blocks(num_small):
    (whole,) = {
        a.memory_bytes
        for a in planned(coordinator_of(4, 8), 1, [1e9]).assignments.values()
    }
    memory_bytes = [whole - 1] * 2 + [1e5] * num_small
    assignments = planned(coordinator_of(4, 8), 1, memory_bytes).assignments
    blocks = [block for a in assignments.values() for block in a.blocks]
    assert sorted(blocks) == [0, 1, 2, 3]


def test_too_few_devices_for_several_a_block_return_several_blocks_each():
    """A mode asks for them; with enough devices each has one block as ever."""
    mode = RoundMode(devices_per_block=2)
    run = statement(bandwidth_hz=2e6, batch_sizes=(), mode=mode)
    for num_devices, lengths in ((3, {2}), (6, {1}), (9, {1})):
        devices = even_fleet(num_devices)
        solved = solve_round(run, known(run, devices, EVEN_NOISE))
        parts = planned_blocks(run, solved)
        blocks = [b for part in parts for b in (part.block_index, *part.further_blocks)]
        assert {1 + len(part.further_blocks) for part in parts} == lengths
        assert Counter(blocks) == Counter({0: 2, 1: 2, 2: 2})


def test_spare_devices_are_of_no_use_where_each_returns_several():
    mode = RoundMode(devices_per_block=2, backups=1)
    run = statement(bandwidth_hz=2e6, batch_sizes=(), mode=mode)
    with pytest.raises(InfeasibleAllocation, match="Too few devices: 3 for 3 blocks"):
        solve_round(run, known(run, even_fleet(3), EVEN_NOISE))


def test_a_batch_is_chosen_by_all_the_examples_of_a_block():
    """Three devices that return all three blocks bring what their batches sum up to."""
    run = statement(bandwidth_hz=2e6, mode=RoundMode(devices_per_block=3))
    solved = solve_round(run, known(run, even_fleet(3), EVEN_NOISE))
    assert solved.batch_size is not None and solved.brought is not None
    (size,) = {*solved.batch_size.tolist()}
    brought = progress(np.full(3, 3 * size), EVEN_NOISE).mean()
    assert solved.brought.progress(EVEN_NOISE) == pytest.approx(brought)


def test_impossible_numbers_are_refused():
    with pytest.raises(UserError, match="returned_by=0 must be at least 1"):
        AllocationOptions(returned_by=0)


def test_a_window_that_begins_again_takes_a_device_as_long_as_all_blocks():
    costs = COSTS.at(16)
    for blocks in ((1, 2, 0), (2, 0), (2, 0, 1)):
        deepest, *_ = span = sorted(blocks)
        flops = costs.joined([span]).flops[deepest]
        assert flops <= costs.joined([range(3)]).flops[0]
        assert flops > costs.flops[0]
        assert np.isfinite(costs.joined([span]).memory_bytes).all()
