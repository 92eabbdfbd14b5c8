"""Devices that return weights rather than gradients."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lola_flwr.allocation import RoundMode
from lola_flwr.costs.estimated import estimate_costs
from lola_flwr.errors import UserError
from lola_flwr.server.replies import DeviceReply
from lola_flwr.system.devices import simulated_device
from tests.flat_settings import coordinator_of
from tests.server.coordinators import (
    PARTITION,
    SHAPES,
    honest_reply,
    make_coordinator,
    npy,
)

STATE = {name: np.ones(SHAPES[name], np.float32) for name in PARTITION.trainable}


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
