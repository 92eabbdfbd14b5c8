from __future__ import annotations

import json
import math
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest

from lola_flwr.allocation import InfeasibleAllocation, RoundMode, allocate
from lola_flwr.costs.estimated import estimate_costs
from lola_flwr.costs.memory import Levers
from lola_flwr.errors import UserError
from lola_flwr.model.blocks import partition_parameters
from lola_flwr.server.coordinator import Coordinator
from lola_flwr.server.replies import DeviceReply
from lola_flwr.server.selection import Selection
from lola_flwr.system.devices import DeviceProfile, InvalidProfile, simulated_device
from lola_flwr.wire.codec import codec_named
from lola_flwr.wire.payload import update_bytes
from lola_flwr.wire.records import UpdateReport
from tests.flat_settings import coordinator_of

SHAPES = {
    "embed.w": (9, 4),
    **{f"layer.{n}.{name}": (4, 4) for n in range(3) for name in ("up", "down")},
    "head.w": (2, 4),
}
PARTITION = partition_parameters(SHAPES)

STATE = {name: np.ones(SHAPES[name], np.float32) for name in PARTITION.trainable}


def make_coordinator(
    *,
    num_devices=4,
    batch_size=8,
    optimizer_options=None,
    without_together=False,
    **options,
) -> Coordinator:
    """A model of three small blocks, plain SGD with a rate of 1, simulated devices."""
    costs = estimate_costs(SHAPES, PARTITION, batch_size=batch_size, sequence_length=4)
    if without_together:
        costs = replace(costs, together=None)
    # The gradients of these tests are round numbers; most are not to be scaled down.
    options.setdefault("max_gradient_norm", 1e3)
    # And most are the same in every round.
    options.setdefault("reputation", False)
    state = {name: np.ones(SHAPES[name], np.float32) for name in PARTITION.trainable}
    coordinator = coordinator_of(
        PARTITION,
        state,
        costs,
        batch_size=batch_size,
        optimizer_options={"optimizer": "SGD", "lr": 1.0, **(optimizer_options or {})},
        **{"bandwidth_hz": 1e6, **options},
    )
    for index in range(num_devices):
        profile = simulated_device(index, seed=1)
        coordinator.add_device(f"id-{index}", profile.to_properties())
    return coordinator


def npy(array) -> bytes:
    stream = BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def size_of(names) -> int:
    """Elements of some parameters together."""
    return sum(math.prod(SHAPES[name]) for name in names)


def honest_reply(plan, device_id, *, value=0.5, **changes) -> DeviceReply:
    """What a device that does its work sends: a gradient of equal elements."""
    blocks = plan.assignments[device_id].blocks
    report = UpdateReport(
        server_round=plan.server_round,
        block_index=blocks[0],
        update_kind="gradient",
        loss=0.7,
        compute_s=0.1,
        compute_clock="simulated",
    )
    names = PARTITION.update_names(*blocks)
    fields = {
        "device_id": device_id,
        "tensors": [npy(np.full(size_of(names), value, np.float32))],
        "num_examples": 8,
        "report": report.to_record(),
    }
    return DeviceReply(**{**fields, **changes})


def test_every_block_is_stepped_by_its_device():
    coordinator = make_coordinator()
    plan = coordinator.plan_round(1, ["id-0", "id-1", "id-2", "id-3"])
    assert sorted(a.block_index for a in plan.assignments.values()) == [0, 1, 2]
    assert sum(a.share for a in plan.assignments.values()) <= 1 + 1e-9

    record = coordinator.complete_round(
        plan,
        [
            honest_reply(plan, device, value=1 + assignment.block_index)
            for device, assignment in plan.assignments.items()
        ],
    )

    state = coordinator.values()
    for block in range(3):
        for name in PARTITION.blocks[block]:
            np.testing.assert_allclose(state[name], 1 - (1 + block))
    # The head is the mean of all three devices: 1 - (1 + 2 + 3) / 3.
    np.testing.assert_allclose(state["head.w"], -1)
    assert record.train_loss == pytest.approx(0.7)
    assert record.refused == {}
    assert [block.status for block in record.blocks] == ["accepted"] * 3
    assert record.round_s == plan.allocation.round_s
    # Every device reported 0.1 s of computation; the uploads are as planned.
    slowest_upload_s = max(block.upload_s for block in record.blocks)
    assert record.wireless_s == record.observed_s == 0.1 + slowest_upload_s


def test_a_missing_block_keeps_its_values():
    coordinator = make_coordinator()
    plan = coordinator.plan_round(1, ["id-0", "id-1", "id-2", "id-3"])
    lost, *there = plan.assignments
    record = coordinator.complete_round(plan, [honest_reply(plan, d) for d in there])
    missing = plan.assignments[lost].block_index
    for name in PARTITION.blocks[missing]:
        np.testing.assert_array_equal(coordinator.values()[name], 1)
    assert record.blocks[missing].status == "no reply"


BAD_REPLIES = {
    "non-finite": lambda plan, d: {
        "tensors": honest_reply(plan, d, value=np.nan).tensors
    },
    "wrong-array": lambda plan, d: {"tensors": [npy(np.zeros(39, np.float32))]},
    "wrong-array ": lambda plan, d: {"tensors": [npy(np.zeros((4, 10), np.float32))]},
    "wrong-count": lambda plan, d: {"tensors": []},
    "wrong-count   ": lambda plan, d: {"tensors": 2 * honest_reply(plan, d).tensors},
    "wrong-examples": lambda plan, d: {"num_examples": 9},
    "wrong-examples ": lambda plan, d: {"num_examples": [8, 9]},
    "wrong-examples  ": lambda plan, d: {"num_examples": 2.5},
    "wrong-examples   ": lambda plan, d: {"num_examples": True},
    "implausible": lambda plan, d: {
        "report": {**honest_reply(plan, d).report, "compute-s": 1e300}
    },
    "implausible ": lambda plan, d: {
        "report": {**honest_reply(plan, d).report, "compute-s": -1.0}
    },
    "implausible  ": lambda plan, d: {
        "report": {**honest_reply(plan, d).report, "loss": 1.7e308}
    },
    "late": lambda plan, d: {
        "report": {**honest_reply(plan, d).report, "server-round": 0}
    },
    "wrong-block": lambda plan, d: {
        "report": {**honest_reply(plan, d).report, "block-index": 7}
    },
    "wrong-kind": lambda plan, d: {
        "report": {**honest_reply(plan, d).report, "update-kind": "wishes"}
    },
    "malformed-report": lambda plan, d: {"report": {"update-kind": "gradient"}},
    "malformed-report ": lambda plan, d: {
        "report": {**honest_reply(plan, d).report, "compute-clock": "x\nround 2: fine"}
    },
    # Without a report, the whole model is expected.
    "wrong-count ": lambda plan, d: {"report": {}},
    "wrong-count  ": lambda plan, d: {"tensors": {"head.w": b""}},
    "not-asked": lambda plan, d: {"device_id": "a stranger"},
}


@pytest.mark.parametrize("reason", BAD_REPLIES)
def test_a_bad_reply_is_refused_and_counted_and_the_round_goes_on(reason):
    coordinator = make_coordinator()
    plan = coordinator.plan_round(1, ["id-0", "id-1", "id-2", "id-3"])
    bad, *good = plan.assignments
    replies = [honest_reply(plan, device) for device in good]
    changes = BAD_REPLIES[reason](plan, bad)
    replies.append(replace(honest_reply(plan, bad), **changes))

    record = coordinator.complete_round(plan, replies)

    assert record.refused == {reason.strip(): 1}
    state = coordinator.values()
    refused_block = plan.assignments[bad].block_index
    for block in range(3):
        expected = 1.0 if block == refused_block else 0.5
        for name in PARTITION.blocks[block]:
            np.testing.assert_array_equal(state[name], expected)
    assert f"1 {reason.strip()}" in "\n".join(record.lines())


def test_a_second_reply_of_one_device_is_refused():
    coordinator = make_coordinator()
    plan = coordinator.plan_round(1, ["id-0", "id-1", "id-2", "id-3"])
    replies = [honest_reply(plan, device) for device in plan.assignments]
    record = coordinator.complete_round(plan, [*replies, replies[0]])
    assert record.refused == {"duplicate": 1}
    np.testing.assert_array_equal(coordinator.values()["head.w"], 0.5)


def test_result_does_not_depend_on_the_order_of_arrival():
    states = []
    for order in ([0, 1, 2], [2, 0, 1]):
        coordinator = make_coordinator()
        plan = coordinator.plan_round(1, ["id-3", "id-2", "id-1", "id-0"])
        values = dict(zip(sorted(plan.assignments), [0.1, 0.3, 0.7], strict=True))
        replies = [
            honest_reply(plan, device, value=values[device], num_examples=1 + 3 * i)
            for i, device in enumerate(sorted(plan.assignments))
        ]
        coordinator.complete_round(plan, [replies[index] for index in order])
        states.append(coordinator.values()["head.w"].copy())
    np.testing.assert_array_equal(*states)


def test_plans_depend_on_names_not_on_ids():
    plans = []
    for ids in (["a", "b", "c", "d"], ["z", "y", "x", "w"]):
        coordinator = make_coordinator(num_devices=0)
        for index, device_id in enumerate(ids):
            profile = simulated_device(index, seed=1)
            coordinator.add_device(device_id, profile.to_properties())
        plans.append(coordinator.plan_round(5, reversed(ids)))
    np.testing.assert_array_equal(
        plans[0].allocation.block_of_device, plans[1].allocation.block_of_device
    )
    assert plans[0].allocation.round_s == plans[1].allocation.round_s


def test_devices_are_asked_for_their_profile_once():
    coordinator = make_coordinator(num_devices=2)
    assert coordinator.meet_devices(1, ["id-0", "new", "id-1"]) == ["new"]
    same_name = simulated_device(0, seed=1).to_properties()
    with pytest.raises(InvalidProfile, match="taken by another device"):
        coordinator.add_device("new", same_name)
    # The device restarts and comes back under another id: its name is free again.
    assert coordinator.meet_devices(1, ["new", "id-1"]) == ["new"]
    coordinator.add_device("new", same_name)


def test_the_name_of_a_nodes_id_is_its_own():
    coordinator = make_coordinator(
        num_devices=0, assumed_profile=simulated_device(0, seed=0)
    )
    properties = simulated_device(1, seed=0).to_properties()
    with pytest.raises(InvalidProfile, match="name='node 8' is reserved"):
        coordinator.add_device("7", {**properties, "name": "node 8"})
    coordinator.add_device("7", {**properties, "name": "node 7"})
    # The device that says nothing still gets the name that was wanted.
    coordinator.add_device("8", {})
    assert coordinator.meet_devices(1, ["7", "8"]) == []


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


def test_memory_is_that_of_what_each_device_will_do():
    coordinator = make_coordinator(num_devices=0, batch_size=4000)
    small = {"flops-per-s": 1e9, "memory-bytes": 1e5, "snr-db": 10.0}
    for index in range(3):
        able = {"splits-batch": True} if index else {}
        coordinator.add_device(str(index), {"name": f"d{index}", **small, **able})
    with pytest.raises(InfeasibleAllocation, match="memory"):
        coordinator.plan_round(1, ["0"])
    # Those that can hold a block are too few for one each.
    plan = coordinator.plan_round(1, ["0", "1", "2"])
    assert set(plan.assignments) == {"1", "2"}
    assert sorted(b for a in plan.assignments.values() for b in a.blocks) == [0, 1, 2]
    coordinator.add_device("3", {"name": "d3", **small, "splits-batch": True})
    plan = coordinator.plan_round(1, ["0", "1", "2", "3"])
    assert set(plan.assignments) == {"1", "2", "3"}
    assert not plan.problem.feasible[0].any()


def test_a_device_that_has_to_run_layers_twice_takes_longer():
    coordinator = make_coordinator(num_devices=0, batch_size=4000)
    costs = estimate_costs(SHAPES, PARTITION, batch_size=4000, sequence_length=4)
    step = costs.step
    once, twice = (
        step.peak_bytes(Levers(4000, recompute_suffix=way))[0] for way in (False, True)
    )
    assert twice < 0.95 * once
    memories = [once, (once + twice) / 2, (once + twice) / 2, 1e9]
    for index, memory_bytes in enumerate(memories):
        profile = DeviceProfile(
            name=f"d{index}",
            flops_per_s=1e9,
            memory_bytes=memory_bytes,
            recomputes_suffix=index != 2,
        )
        coordinator.add_device(str(index), profile.to_properties())
    plan = coordinator.plan_round(1, ["0", "1", "2", "3"])
    np.testing.assert_array_equal(plan.problem.feasible[:, 0], [1, 1, 0, 1])
    one, two, _, most = plan.problem.compute_s[:, 0]
    assert one == most
    assert two - one == pytest.approx(step.recomputation().further_flops[0] / 1e9)
    # Several blocks, too.
    plan = coordinator.plan_round(2, ["1"])
    (assignment,) = plan.assignments.values()
    first = assignment.block_index
    once_s = costs.joined([assignment.blocks]).flops[first] / 1e9
    assert len(assignment.blocks) > 1
    assert plan.problem.compute_s[0, first] > 1.1 * once_s


@pytest.mark.parametrize(("peak", "fault"), [(None, False), (8e8, False), (9e9, True)])
def test_more_memory_than_a_device_offers_is_a_fault(peak, fault):
    coordinator = make_coordinator()
    plan = coordinator.plan_round(1, ["id-0", "id-1", "id-2", "id-3"])
    reply = honest_reply(plan, next(iter(plan.assignments)))
    if peak is not None:
        reply = replace(reply, report={**reply.report, "peak-memory-bytes": peak})
    record = coordinator.complete_round(plan, [reply])
    part = next(b for b in record.blocks if b.status == "accepted")
    assert part.peak_memory_bytes == peak
    assert part.exceeds_memory == fault
    lines = [line for line in record.lines() if "fault of the cost model" in line]
    assert len(lines) == fault
    if fault:
        assert f"{part.device} took 9000.0 MB of memory" in lines[0]


def test_memory_that_does_not_suffice_is_named():
    coordinator = make_coordinator(num_devices=0, batch_size=4000)
    small = {"flops-per-s": 1e9, "memory-bytes": 1e5, "snr-db": 10.0}
    for index in range(3):
        coordinator.add_device(str(index), {"name": f"d{index}", **small})
    with pytest.raises(InfeasibleAllocation, match=r"block 0.*required_memory_bytes"):
        coordinator.plan_round(1, ["0", "1", "2"])


def test_records_are_strict_json():
    coordinator = make_coordinator(allocator="random")
    plan = coordinator.plan_round(1, ["id-0", "id-1", "id-2", "id-3"])
    record = coordinator.complete_round(plan, [])
    values = json.loads(record.to_json())
    assert values["bound_s"] is None
    assert values["train_loss"] is None
    assert [block["status"] for block in values["blocks"]] == ["no reply"] * 3


def test_constant_parts_of_the_round_count():
    ids = ["id-0", "id-1", "id-2", "id-3"]
    plain = make_coordinator().plan_round(1, ids)
    longer = make_coordinator(broadcast_s=2.0, server_s=0.5).plan_round(1, ids)
    assert longer.allocation.round_s == pytest.approx(plain.allocation.round_s + 2.5)


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


def fleet_of_equals(count, **options):
    """Devices that differ in nothing, so that only what they do can set them apart."""
    coordinator = make_coordinator(num_devices=0, **options)
    for index in range(count):
        properties = {"flops-per-s": 1e6, "memory-bytes": 1e9, "snr-db": 60.0}
        coordinator.add_device(f"id-{index}", {"name": f"d{index}", **properties})
    return coordinator, [f"id-{index}" for index in range(count)]


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


def test_devices_without_memory_are_excluded_and_counted_where_all_take_part():
    coordinator = make_coordinator(
        num_devices=3, batch_size=4000, mode=RoundMode(participation="all")
    )
    tiny = {"flops-per-s": 1e9, "memory-bytes": 1e5, "snr-db": 10.0}
    coordinator.add_device("tiny", {"name": "tiny", **tiny})
    plan = coordinator.plan_round(1, ["id-0", "id-1", "id-2", "tiny"])
    assert plan.solved.num_excluded == 1
    assert "tiny" not in plan.assignments


def own_allocator(problem, **options):
    """Stand in for a user's own allocator."""
    return allocate(problem, "crunch")


def test_an_allocator_of_ones_own_by_import_path():
    own = make_coordinator(allocator="tests.server.test_coordinator:own_allocator")
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


def test_one_huge_gradient_does_not_freeze_the_optimizer():
    def distance_after(first_value):
        coordinator = make_coordinator(
            optimizer_options={"optimizer": "AdamW"}, max_gradient_norm=10.0
        )
        ids = ["id-0", "id-1", "id-2", "id-3"]
        for server_round in range(1, 61):
            plan = coordinator.plan_round(server_round, ids)
            liar = next(iter(plan.assignments))
            replies = [
                honest_reply(
                    plan,
                    device,
                    value=first_value if (device, server_round) == (liar, 1) else 0.5,
                )
                for device in plan.assignments
            ]
            coordinator.complete_round(plan, replies)
        return float(1 - coordinator.values()["head.w"].mean())

    assert distance_after(1e30) > 0.5 * distance_after(0.5)


def test_updates_within_the_norm_are_left_alone():
    coordinator = make_coordinator(max_gradient_norm=1e9)
    plan = coordinator.plan_round(1, ["id-0", "id-1", "id-2", "id-3"])
    replies = [honest_reply(plan, device, value=1e3) for device in plan.assignments]
    coordinator.complete_round(plan, replies)
    np.testing.assert_allclose(coordinator.values()["head.w"], 1 - 1e3, rtol=1e-6)


def test_no_device_with_a_profile():
    with pytest.raises(InfeasibleAllocation, match="No device has reported a usable"):
        make_coordinator(num_devices=0).plan_round(1, ["a", "b"])


def test_infeasible_rounds_name_devices_not_rows():
    coordinator = make_coordinator(num_devices=0, batch_size=4000)
    for name, memory_bytes in (("b", 1e5), ("c", 2e5), ("a", 1e5)):
        properties = {"flops-per-s": 1e9, "memory-bytes": memory_bytes, "snr-db": 9.0}
        coordinator.add_device(name, {"name": f"phone-{name}", **properties})
    with pytest.raises(InfeasibleAllocation, match="device phone-c"):
        coordinator.plan_round(1, ["a", "b", "c"])


def weights_reply(plan, device_id, *, value=0.4, **changes) -> DeviceReply:
    """What a device sends that has trained its block to weights of one value."""
    reply = honest_reply(plan, device_id, num_examples=10_000)
    names = PARTITION.update_names(plan.assignments[device_id].block_index)
    fields = {
        "report": {**reply.report, "update-kind": "weights"},
        "tensors": [npy(np.full(SHAPES[name], value, np.float32)) for name in names],
    }
    return replace(reply, **{**fields, **changes})


def test_weights_are_refused_where_gradients_alone_are_asked_for():
    coordinator = make_coordinator()
    plan = coordinator.plan_round(1, ["id-0", "id-1", "id-2", "id-3"])
    record = coordinator.complete_round(
        plan, [weights_reply(plan, device) for device in plan.assignments]
    )
    assert record.refused == {"wrong-kind": 3}


def assert_moved_to_weights(coordinator):
    """Blocks go a third of the way from 1 to 0.4, 1 - 0.6 / 3; the head goes there."""
    for name, values in coordinator.values().items():
        expected = 0.4 if name == "head.w" else 0.8
        np.testing.assert_allclose(values, expected, rtol=1e-6)


def test_weights_are_a_move_that_is_damped_by_the_number_of_blocks():
    coordinator = make_coordinator(state_dict=STATE)
    plan = coordinator.plan_round(1, ["id-0", "id-1", "id-2", "id-3"])
    record = coordinator.complete_round(
        plan, [weights_reply(plan, device) for device in plan.assignments]
    )
    assert record.refused == {}
    assert_moved_to_weights(coordinator)


def test_weights_travel_as_float32_under_any_codec():
    coordinator = make_coordinator(codec="bf16", state_dict=STATE)
    plan = coordinator.plan_round(1, ["id-0", "id-1", "id-2", "id-3"])
    record = coordinator.complete_round(
        plan, [weights_reply(plan, device) for device in plan.assignments]
    )
    assert record.refused == {}


def test_weights_of_a_model_of_one_block_are_averaged_as_fedavg_does():
    partition = PARTITION.merged()
    costs = estimate_costs(
        SHAPES, PARTITION, batch_size=8, sequence_length=4, merged=True
    )
    state = {name: np.ones(SHAPES[name], np.float32) for name in partition.trainable}
    coordinator = coordinator_of(
        partition,
        state,
        costs,
        bandwidth_hz=1e6,
        optimizer="SGD",
        lr=1.0,
        mode=RoundMode(participation="all"),
        max_gradient_norm=1e3,
        batch_size=8,
        state_dict=state,
    )
    for index in range(2):
        profile = simulated_device(index, seed=1)
        coordinator.add_device(f"id-{index}", profile.to_properties())
    plan = coordinator.plan_round(1, ["id-0", "id-1"])
    replies = []
    for device, value, examples in (("id-0", 0.0, 2), ("id-1", 0.5, 6)):
        tensors = [npy(np.full(SHAPES[n], value, "f4")) for n in partition.trainable]
        replies.append(
            weights_reply(plan, device, tensors=tensors, num_examples=examples)
        )
    assert coordinator.complete_round(plan, replies).refused == {}
    # Weighted by examples: (2 * 0.0 + 6 * 0.5) / 8.
    for values in coordinator.values().values():
        np.testing.assert_allclose(values, 0.375, rtol=1e-6)


WHOLE = {name: np.full(shape, 0.4, np.float32) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("by_name", [False, True])
def test_of_a_whole_model_the_block_is_taken_and_the_rest_is_reported(by_name):
    state_dict = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}
    coordinator = make_coordinator(state_dict=state_dict)
    assert list(coordinator.arrays()) == list(SHAPES)
    plan = coordinator.plan_round(1, ["id-0", "id-1", "id-2", "id-3"])
    knowing, *ignorant = plan.assignments
    tensors = {name: npy(array) for name, array in WHOLE.items()}
    record = coordinator.complete_round(
        plan,
        [
            weights_reply(plan, knowing),
            *(
                DeviceReply(
                    device_id=device,
                    tensors=tensors if by_name else list(tensors.values()),
                    num_examples=100,
                    report={"loss": 0.3, "server-round": 7},
                )
                for device in ignorant
            ),
        ],
    )
    assert record.refused == {}
    assert_moved_to_weights(coordinator)
    np.testing.assert_array_equal(coordinator.arrays()["embed.w"], 1)
    # 8 arrays, of which a block of 2 and the head of 1 are of use.
    assert sorted(block.ignored_arrays for block in record.blocks) == [0, 5, 5]
    assert "2 devices sent arrays beyond their block, 10 in all" in "\n".join(
        record.lines()
    )
    # Its loss and its time are not known.
    assert record.train_loss == pytest.approx(0.7)
    reported = sorted(str(block.reported_compute_s) for block in record.blocks)
    assert reported == ["0.1", "None", "None"]


@pytest.mark.parametrize(
    ("reason", "name", "array"),
    [
        ("non-finite", "head.w", np.full((2, 4), np.inf, np.float32)),
        ("wrong-array", "head.w", np.ones((2, 5), np.float32)),
        ("wrong-array", "head.w", np.ones((2, 4), np.float64)),
        ("wrong-count", "head.w", None),
    ],
)
def test_bad_weights_are_refused(reason, name, array):
    coordinator = make_coordinator()
    plan = coordinator.plan_round(1, ["id-0", "id-1", "id-2", "id-3"])
    device = next(iter(plan.assignments))
    whole = {**WHOLE, name: array}
    tensors = {n: npy(values) for n, values in whole.items() if values is not None}
    reply = DeviceReply(device, tensors, 100, {})
    assert coordinator.complete_round(plan, [reply]).refused == {reason: 1}
    for values in coordinator.values().values():
        np.testing.assert_array_equal(values, 1)


def test_a_huge_move_is_scaled_down_like_a_gradient():
    coordinator = make_coordinator(max_gradient_norm=3.0, state_dict=STATE)
    plan = coordinator.plan_round(1, ["id-0", "id-1", "id-2", "id-3"])
    device = next(iter(plan.assignments))
    coordinator.complete_round(plan, [weights_reply(plan, device, value=-1e4)])
    # A block is damped by the number of blocks, 3; the head is not.
    moved = [
        (values - 1) * (1 if name == "head.w" else 3)
        for name, values in coordinator.values().items()
    ]
    norm = np.sqrt(sum(np.square(m, dtype=np.float64).sum() for m in moved))
    assert norm == pytest.approx(3.0, rel=1e-5)


def test_devices_without_a_profile_get_the_assumed_one():
    assumed = simulated_device(0, seed=1)
    coordinator = make_coordinator(num_devices=0, assumed_profile=assumed)
    ids = ["1", "2", "3"]
    for device in coordinator.meet_devices(1, ids):
        coordinator.add_device(device, {})
    assert len(coordinator.plan_round(1, ids).assignments) == 3
    assert coordinator.meet_devices(1, ids) == []
    with pytest.raises(InvalidProfile, match="lacks"):
        make_coordinator(num_devices=0).add_device("1", {})


def test_state_dict_without_a_trained_parameter():
    with pytest.raises(UserError, match=r"state_dict lacks layer\.0\.up"):
        make_coordinator(state_dict={"embed.w": np.ones((9, 4), np.float32)})


def test_starting_values():
    state_dict = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}
    coordinator = make_coordinator(state_dict=state_dict)
    trained = {n: np.zeros(SHAPES[n]) for n in PARTITION.trainable}
    coordinator.start_from({**state_dict, **trained})
    assert not any(values.any() for values in coordinator.values().values())
    for change, message in [
        ({"embed.w": np.zeros((9, 4))}, "embed.w, which nobody trains, differs"),
        ({"head.w": np.zeros((2, 5))}, r"head.w has shape \(2, 5\); expected \(2, 4\)"),
        ({"other": np.zeros(1)}, "other is unknown"),
    ]:
        with pytest.raises(UserError, match=message):
            coordinator.start_from({**state_dict, **change})


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
