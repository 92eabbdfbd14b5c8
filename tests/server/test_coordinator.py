"""A coordinator's rounds: what steps blocks, its plans, profiles and records."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from lola_flwr.allocation import InfeasibleAllocation
from lola_flwr.system.devices import InvalidProfile, simulated_device
from tests.server.coordinators import PARTITION, honest_reply, make_coordinator, npy


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
