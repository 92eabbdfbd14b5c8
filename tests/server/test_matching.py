"""Who is given which block: by speed, in rotation, at random or by one's own rule."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lola_flwr.allocation import RoundMode, allocate
from lola_flwr.costs.estimated import estimate_costs
from lola_flwr.errors import UserError
from tests.server.coordinators import (
    PARTITION,
    SHAPES,
    fleet_of_equals,
    honest_reply,
    make_coordinator,
)


def run_rounds(coordinator, rounds, true_compute_s, ids):
    """Run rounds in which a device needs true_compute_s(id, block, round) seconds."""
    plans, records = [], []
    for server_round in rounds:
        plan = coordinator.plan_round(server_round, ids)
        replies = []
        for device, assignment in plan.assignments.items():
            seconds = true_compute_s(device, assignment.block_index, server_round)
            reply = honest_reply(plan, device)
            report = {**reply.report, "compute-s": seconds}
            replies.append(replace(reply, report=report))
        plans.append(plan)
        records.append(coordinator.complete_round(plan, replies))
    return plans, records


def test_a_device_that_slows_down_gets_shallower_blocks_within_three_rounds():
    coordinator, ids = fleet_of_equals(2)
    fastest = {"flops-per-s": 1.5e6, "memory-bytes": 1e9, "snr-db": 60.0}
    coordinator.add_device("fast", {"name": "fast", **fastest})
    ids.append("fast")
    costs = estimate_costs(SHAPES, PARTITION, batch_size=8, sequence_length=4)

    def true_compute_s(device, block, server_round):
        speed = 1.5e6 if device == "fast" else 1e6
        slowdown = 4.0 if device == "fast" and server_round > 5 else 1.0
        return float(costs.flops[block]) / speed * slowdown

    plans, records = run_rounds(coordinator, range(1, 12), true_compute_s, ids)
    for plan in plans[:5]:
        assert plan.assignments["fast"].block_index == 0, "the layer near the input"
    for plan in plans[5 + 3 :]:
        assert plan.assignments["fast"].block_index == 2, "the last layer"
    # Predictions meet what is observed again.
    assert records[5].observed_s > 2 * records[5].round_s
    assert records[-1].observed_s == pytest.approx(records[-1].round_s, rel=0.05)


def test_profiles_are_left_alone_where_asked():
    coordinator, ids = fleet_of_equals(3, correct_profiles=False)
    _, records = run_rounds(coordinator, range(1, 6), lambda *_: 50.0, ids)
    assert records[-1].round_s == pytest.approx(records[0].round_s, rel=0.05)


def test_rotation_lets_blocks_meet_all_devices_within_the_bound():
    def pairs(eps):
        coordinator, ids = fleet_of_equals(5, rotation_eps=eps, correct_profiles=False)
        plans, records = run_rounds(coordinator, range(1, 31), lambda *_: 1.0, ids)
        for record in records:
            assert record.round_s <= (1 + eps) * record.bound_s * (1 + 1e-9)
        return {
            (device, assignment.block_index)
            for plan in plans
            for device, assignment in plan.assignments.items()
        }

    # Equal devices differ by their fading alone; 50 % more latency frees the choice.
    assert len(pairs(0.5)) == 15
    assert len(pairs(0.5)) >= len(pairs(0.0))


def test_all_devices_take_part_where_asked():
    coordinator = make_coordinator(mode=RoundMode(participation="all"))
    plan = coordinator.plan_round(1, ["id-0", "id-1", "id-2", "id-3"])
    assert sorted(plan.assignments) == ["id-0", "id-1", "id-2", "id-3"]
    replies = [
        honest_reply(plan, device, value=value)
        for device, value in zip(plan.assignments, [1, 2, 3, 4], strict=True)
    ]
    coordinator.complete_round(plan, replies)
    by_block = {}
    for reply, value in zip(replies, [1, 2, 3, 4], strict=True):
        block = plan.assignments[reply.device_id].block_index
        by_block.setdefault(block, []).append(value)
    for block, values in by_block.items():
        for name in PARTITION.blocks[block]:
            np.testing.assert_allclose(coordinator.values()[name], 1 - np.mean(values))


def own_allocator(problem, **options):
    """Stand in for a user's own allocator."""
    return allocate(problem, "crunch")


def test_an_allocator_of_ones_own_by_import_path():
    own = make_coordinator(allocator="tests.server.test_matching:own_allocator")
    plan = own.plan_round(1, ["id-0", "id-1", "id-2", "id-3"])
    crunch = make_coordinator(allocator="crunch").plan_round(
        1, ["id-0", "id-1", "id-2", "id-3"]
    )
    assert plan.allocation.round_s == crunch.allocation.round_s


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("crunsh", "Did you mean 'crunch'"),
        ("no.such.module:f", "cannot be imported"),
        ("math:pi", "not a function"),
    ],
)
def test_unknown_allocators_are_errors_before_the_first_round(name, message):
    with pytest.raises(UserError, match=message):
        make_coordinator(allocator=name)


def test_random_matchings_differ_from_round_to_round():
    coordinator = make_coordinator(allocator="random", num_devices=12)
    ids = [f"id-{index}" for index in range(12)]
    plans = [coordinator.plan_round(r, ids) for r in range(1, 6)]
    matchings = {tuple(plan.allocation.block_of_device) for plan in plans}
    assert len(matchings) >= 4
    again = make_coordinator(allocator="random", num_devices=12).plan_round(3, ids)
    np.testing.assert_array_equal(
        again.allocation.block_of_device, plans[2].allocation.block_of_device
    )
