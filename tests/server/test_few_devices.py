"""Fewer devices than blocks, or more: several blocks each, turns and sharing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lola_flwr.allocation import InfeasibleAllocation
from lola_flwr.costs.estimated import estimate_costs
from lola_flwr.errors import UserError
from lola_flwr.server.selection import Selection
from lola_flwr.system.devices import simulated_device
from lola_flwr.wire.codec import codec_named
from lola_flwr.wire.payload import update_bytes
from tests.server.coordinators import PARTITION, SHAPES, honest_reply, make_coordinator


def test_two_devices_train_three_blocks():
    coordinator = make_coordinator()
    plan = coordinator.plan_round(1, ["id-0", "id-1", "unknown"])
    one, two = plan.assignments.values()
    assert sorted(one.blocks + two.blocks) == [0, 1, 2]
    assert {len(one.blocks), len(two.blocks)} == {1, 2}
    replies = [
        honest_reply(plan, device, value=2.0 + n)
        for n, device in enumerate(plan.assignments)
    ]
    record = coordinator.complete_round(plan, replies)
    assert record.refused == {}
    values = coordinator.values()
    for step, assignment in ((2.0, one), (3.0, two)):
        for name in PARTITION.update_names(*assignment.blocks, head=False):
            np.testing.assert_allclose(values[name], 1 - step)
    np.testing.assert_allclose(values["head.w"], 1 - 2.5)
    # Both are asked for what they are said to have been asked for, and both blocks of
    # the one count.
    assert {part.blocks for part in record.blocks} == {one.blocks, two.blocks}
    assert [part.payload_bytes for part in record.blocks] == [
        update_bytes(PARTITION.update_names(*part.blocks), SHAPES, codec_named("fp32"))
        for part in record.blocks
    ]
    assert coordinator.state.block_updates().tolist() == [1, 1, 1]
    assert record.bound_s == pytest.approx(record.round_s, rel=1e-9)


def test_who_stays_takes_over_from_who_leaves():
    coordinator = make_coordinator(num_devices=2)
    ids = ["id-0", "id-1"]
    plan = coordinator.plan_round(1, ids)
    record = coordinator.complete_round(plan, [honest_reply(plan, "id-0")])
    assert sorted(part.status for part in record.blocks) == ["accepted", "no reply"]
    # It rests for a round, though it is still connected.
    plan = coordinator.plan_round(2, ids)
    assert {d: a.blocks for d, a in plan.assignments.items()} == {"id-0": (0, 1, 2)}
    coordinator.complete_round(plan, [honest_reply(plan, "id-0")])
    plan = coordinator.plan_round(3, ids)
    assert set(plan.assignments) == set(ids)
    plan = coordinator.plan_round(4, ["id-1"])
    assert {d: a.blocks for d, a in plan.assignments.items()} == {"id-1": (0, 1, 2)}


def test_a_block_by_itself_costs_what_it_does_alone():
    """The last one, too, behind which there is none."""
    costs = estimate_costs(SHAPES, PARTITION, batch_size=4, sequence_length=4)
    joined = costs.joined([(block,) for block in range(costs.flops.size)])
    np.testing.assert_allclose(joined.flops, costs.flops)
    np.testing.assert_allclose(joined.memory_bytes, costs.memory_bytes)
    np.testing.assert_allclose(joined.payload_bits, costs.payload_bits)


def test_without_the_memory_for_two_blocks_they_take_turns():
    coordinator = make_coordinator(num_devices=0, batch_size=4000)
    costs = estimate_costs(SHAPES, PARTITION, batch_size=4000, sequence_length=4)
    # Enough for the deepest block alone.
    for n in range(2):
        profile = replace(
            simulated_device(n, seed=1), memory_bytes=float(costs.memory_bytes[0])
        )
        coordinator.add_device(str(n), profile.to_properties())
    assert costs.joined([(0, 1)]).memory_bytes[0] > costs.memory_bytes[0]
    for server_round in range(1, 4):
        plan = coordinator.plan_round(server_round, ["0", "1"])
        trained = [a.blocks for a in plan.assignments.values()]
        assert len(trained) == 2
        replies = [honest_reply(plan, device) for device in plan.assignments]
        assert coordinator.complete_round(plan, replies).refused == {}
    updates = coordinator.state.block_updates()
    assert updates.min() >= 2


def test_a_block_that_nobody_can_hold_is_refused_with_few_devices_too():
    coordinator = make_coordinator(num_devices=0, batch_size=4000)
    costs = estimate_costs(SHAPES, PARTITION, batch_size=4000, sequence_length=4)
    profile = replace(
        simulated_device(0, seed=1), memory_bytes=float(costs.memory_bytes[1])
    )
    coordinator.add_device("0", profile.to_properties())
    with pytest.raises(InfeasibleAllocation, match="No device can hold block 0"):
        coordinator.plan_round(1, ["0"])


def test_costs_of_single_blocks_alone_let_few_devices_take_turns():
    coordinator = make_coordinator(num_devices=2, without_together=True)
    for server_round in range(1, 4):
        plan = coordinator.plan_round(server_round, ["id-0", "id-1"])
        assert [len(a.blocks) for a in plan.assignments.values()] == [1, 1]
        coordinator.complete_round(
            plan, [honest_reply(plan, d) for d in plan.assignments]
        )
    assert coordinator.state.block_updates().tolist() == [2, 2, 2]


def test_idle_devices_share_blocks_within_the_latency_given_up():
    alone = make_coordinator(num_devices=8)
    ids = [f"id-{n}" for n in range(8)]
    best_s = alone.plan_round(1, ids).allocation.round_s
    coordinator = make_coordinator(num_devices=8, sharing_eps=0.5)
    plan = coordinator.plan_round(1, ids)
    assert len(plan.assignments) > 3
    assert best_s < plan.allocation.round_s <= 1.5 * best_s * (1 + 1e-9)
    replies = [
        honest_reply(plan, device, value=float(n))
        for n, device in enumerate(plan.assignments)
    ]
    record = coordinator.complete_round(plan, replies)
    assert record.refused == {}
    assert record.bound_s == pytest.approx(best_s)
    for block in range(3):
        values = [
            n for n, a in enumerate(plan.assignments.values()) if a.blocks == (block,)
        ]
        for name in PARTITION.blocks[block]:
            stepped = coordinator.values()[name]
            np.testing.assert_allclose(stepped, 1 - np.mean(values), rtol=1e-6)


def test_a_latency_target_is_kept_by_those_who_share():
    ids = [f"id-{n}" for n in range(8)]
    best_s = make_coordinator(num_devices=8).plan_round(1, ids).allocation.round_s
    coordinator = make_coordinator(
        num_devices=8, sharing_eps=9.0, selection=Selection(latency_target_s=2 * best_s)
    )
    plan = coordinator.plan_round(1, ids)
    assert len(plan.assignments) > 3
    assert plan.allocation.round_s <= 2 * best_s * (1 + 1e-9)
    with pytest.raises(UserError, match="sharing_eps=-1"):
        make_coordinator(sharing_eps=-1)
