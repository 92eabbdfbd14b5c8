from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from lola_flwr.build import Channel, DeviceOptions, RoundSettings, coordinator_for
from lola_flwr.costs.estimated import BlockCosts, estimate_costs
from lola_flwr.costs.of_model import model_costs, zeroth_order_costs
from lola_flwr.device.block_device import BlockDevice
from lola_flwr.errors import UserError
from lola_flwr.model.adapter_blocks import model_partition
from lola_flwr.model.adapters import adapt
from lola_flwr.model.backprop import block_gradient
from lola_flwr.model.blocks import partition_parameters
from lola_flwr.model.loading import fingerprint, load_classifier
from lola_flwr.server.replies import DeviceReply
from lola_flwr.server.selection import RoundRobin, Selection
from lola_flwr.system.devices import simulated_device
from lola_flwr.wire.payload import projections_bytes
from lola_flwr.wire.records import PROJECTION_TYPE
from lola_flwr.zeroth_order.directions import (
    MAX_DIRECTIONS,
    Directions,
    estimated_gradient,
)
from lola_flwr.zeroth_order.mixing import ZerothOrder
from lola_flwr.zeroth_order.projections import projected_gradients
from simulations.compare.measure import peak_bytes
from tests.server.coordinators import (
    PARTITION,
    SHAPES,
    honest_reply,
    make_coordinator,
    npy,
)


def whole(directions, number, name, values):
    return np.concatenate([*directions.along(number, name, values)])


def test_directions_are_signs_that_follow_from_seed_number_and_name(rng):
    values = rng.normal(size=100_000).astype(np.float32)
    signs = whole(Directions(3, 2), 0, "w", values)
    assert set(signs) == {-1, 1}
    assert abs(signs.mean()) < 5 / np.sqrt(signs.size)
    np.testing.assert_array_equal(signs, whole(Directions(3, 9), 0, "w", -values))
    for other in (
        whole(Directions(4, 2), 0, "w", values),
        whole(Directions(3, 2), 1, "w", values),
        whole(Directions(3, 2), 0, "v", values),
    ):
        assert abs((signs * other).mean()) < 5 / np.sqrt(signs.size)


def test_the_mask_moves_the_smallest_weights(rng):
    values = rng.normal(size=(40, 25)).astype(np.float32)
    signs = whole(Directions(3, 1, smallest_share=0.3), 0, "w", values)
    moved = signs != 0
    assert moved.sum() == 300
    flat = abs(values.reshape(-1))
    assert flat[moved].max() < flat[~moved].min()


def partition_of(model):
    return partition_parameters(name for name, _ in model.named_parameters())


def test_projections_are_directional_derivatives(roberta, batch):
    names = partition_of(roberta).update_names(1)
    before = {n: p.detach().clone() for n, p in roberta.named_parameters()}
    gradient = block_gradient(roberta, partition_of(roberta), 1, batch).gradients
    directions = Directions(7, 3, smallest_share=0.5, perturbation=1e-3)
    projections, loss = projected_gradients(
        roberta, names, batch, directions=directions
    )
    expected = [
        sum(
            float(
                gradient[n].numpy().reshape(-1)
                @ whole(directions, k, n, before[n].numpy())
            )
            for n in names
        )
        for k in range(3)
    ]
    np.testing.assert_allclose(projections, expected, rtol=0.02, atol=2e-4)
    assert loss == pytest.approx(roberta(**batch).loss.item(), abs=1e-3)
    for name, parameter in roberta.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_the_estimate_is_the_gradient_on_average(rng):
    values = {"w": rng.normal(size=(4, 5)).astype(np.float32)}
    gradient = rng.normal(size=20).astype(np.float32)
    directions = Directions(1, 4_000)
    projections = np.array(
        [gradient @ whole(directions, k, "w", values["w"]) for k in range(4_000)]
    )
    (estimate,) = estimated_gradient(
        values, ["w"], directions=directions, projections=projections.astype("f4")
    ).values()
    # Five standard deviations of a mean over the directions.
    tolerance = 5 * np.linalg.norm(gradient) / np.sqrt(4_000)
    np.testing.assert_allclose(estimate.reshape(-1), gradient, atol=tolerance)


@pytest.mark.slow
def test_peak_memory_is_within_a_tenth_of_inference():
    model, _ = load_classifier("minilm-l6", num_labels=2)
    partition = partition_of(model)
    batch = {
        "input_ids": torch.randint(5, 1000, (16, 32)),
        "labels": torch.zeros(16, dtype=torch.long),
    }
    weights = sum(p.nbytes for p in model.parameters())
    with torch.no_grad():
        inference = weights + peak_bytes(model, lambda: model(**batch))
    zeroth_order = weights + peak_bytes(
        model,
        lambda: projected_gradients(
            model, partition.update_names(0), batch, directions=Directions(1, 2)
        ),
    )
    backward = weights + peak_bytes(model, block_gradient, model, partition, 0, batch)
    assert inference < zeroth_order < 1.1 * inference
    assert backward > 1.3 * inference


# --- on the server -------------------------------------------------------------------


def settings(**changes):
    # Less memory than any block's training takes.
    trained = estimate_costs(SHAPES, PARTITION, batch_size=4000, sequence_length=4)
    same = np.ones(PARTITION.num_blocks)
    costs = BlockCosts(
        flops=16 * trained.flops.max() * same,
        memory_bytes=trained.memory_bytes.min() / 2 * same,
        payload_bits=8.0 * projections_bytes(16) * same,
        gradient_bytes=0.0 * same,
    )
    return ZerothOrder(costs=costs, **{"lr": 0.5, **changes})


def fleet(num_able, num_small, **options):
    """Devices that can back-propagate, and some that cannot."""
    coordinator = make_coordinator(num_devices=num_able, batch_size=4000, **options)
    memory_bytes = settings().costs.memory_bytes.max() * 1.01
    for index in range(num_small):
        properties = {"flops-per-s": 1e9, "memory-bytes": memory_bytes, "snr-db": 9.0}
        coordinator.add_device(f"small-{index}", {"name": f"s{index}", **properties})
    return coordinator, [
        *(f"id-{i}" for i in range(num_able)),
        *(f"small-{i}" for i in range(num_small)),
    ]


def without_backward(plan):
    return {d for d, a in plan.assignments.items() if a.direction_seed is not None}


def test_small_devices_fill_in_where_the_others_do_not_suffice():
    coordinator, ids = fleet(2, 2, zeroth_order=settings())
    plan = coordinator.plan_round(1, ids)
    assert {a.block_index for a in plan.assignments.values()} == {0, 1, 2}
    assert len(without_backward(plan)) >= 1
    assert without_backward(plan) <= {"small-0", "small-1"}
    # Where they cannot, the others train several blocks.
    other, ids = fleet(2, 2)
    assert other.plan_round(1, ids).assignments.keys() == {"id-0", "id-1"}


def test_they_fill_in_for_devices_that_rest():
    coordinator, ids = fleet(3, 2, zeroth_order=settings())
    filled_in = []
    for server_round in range(1, 8):
        plan = coordinator.plan_round(server_round, ids)
        small = without_backward(plan)
        filled_in.append(bool(small))
        if small:
            assert "id-2" not in plan.assignments, "it rests, and need not be asked"
        replies = [
            projections_reply(plan, device, np.full(16, 0.1))
            if device in small
            else honest_reply(plan, device)
            for device in plan.assignments
            if device != "id-2"
        ]
        assert coordinator.complete_round(plan, replies).refused == {}
    # It rests one round, then two, then four.
    assert filled_in == [False, True, False, True, True, False, True]


def test_they_idle_where_the_others_suffice():
    coordinator, ids = fleet(3, 2, zeroth_order=settings())
    assert without_backward(coordinator.plan_round(1, ids)) == set()
    coordinator, ids = fleet(3, 2, zeroth_order=settings(use="always"))
    plan = coordinator.plan_round(1, ids)
    assert without_backward(plan) == set(plan.assignments)


def test_they_idle_where_the_others_suffice_for_the_chosen_blocks():
    coordinator, ids = fleet(
        2, 2, zeroth_order=settings(), selection=Selection(RoundRobin(count=2))
    )
    for server_round in (1, 2):
        plan = coordinator.plan_round(server_round, ids)
        assert len(plan.assignments) == 2
        assert without_backward(plan) == set()


def test_projections_have_no_codec():
    uploads_s = []
    for options in ({}, {"codec": "auto", "codec_slack": 50.0}):
        coordinator, ids = fleet(2, 2, zeroth_order=settings(), **options)
        plan = coordinator.plan_round(1, ids)
        (small,) = without_backward(plan)
        record = coordinator.complete_round(plan, [])
        codecs = {block.device: block.codec for block in record.blocks}
        assert codecs.pop(plan.profiles[small].name) == ""
        assert set(codecs.values()) == {"fp32"}  # "auto": there is time for it
        uploads_s.append(plan.problem.full_band_upload_s[plan.device_ids.index(small)])
    np.testing.assert_array_equal(*uploads_s)


def test_directions_differ_by_device_and_round():
    coordinator, ids = fleet(3, 0, zeroth_order=settings(use="always"))
    seeds = [
        a.direction_seed
        for r in (1, 2)
        for a in coordinator.plan_round(r, ids).assignments.values()
    ]
    assert len(set(seeds)) == 6


def on_the_wire(values):
    return np.asarray(values, PROJECTION_TYPE).tobytes()


def projections_reply(plan, device, values, **changes):
    assignment = plan.assignments[device]
    report = {
        **honest_reply(plan, device).report,
        "update-kind": "zeroth-order",
        "direction-seed": assignment.direction_seed,
        "projections": on_the_wire(values),
    }
    fields = {
        "device_id": device,
        "tensors": {},
        "num_examples": 8,
        "report": report,
    }
    return DeviceReply(**{**fields, **changes})


def test_blocks_move_against_the_estimated_gradient():
    coordinator, ids = fleet(3, 0, zeroth_order=settings(use="always"))
    plan = coordinator.plan_round(1, ids)
    device, assignment = next(iter(plan.assignments.items()))
    before = {n: v.copy() for n, v in coordinator.values().items()}
    values = np.linspace(-1, 1, 16)
    record = coordinator.complete_round(plan, [projections_reply(plan, device, values)])
    assert record.refused == {}
    logged = {block.block_index: block for block in record.blocks}
    mine, costs = logged[assignment.block_index], settings().costs
    assert mine.ignored_arrays == 0
    assert mine.received_bytes == 16 * 4
    assert mine.required_memory_bytes == assignment.memory_bytes
    assert mine.required_memory_bytes == costs.memory_bytes[mine.block_index]
    assert mine.payload_bytes == costs.payload_bits[mine.block_index] // 8
    names = PARTITION.update_names(assignment.block_index)
    expected = estimated_gradient(
        before,
        names,
        directions=Directions(assignment.direction_seed, 16),
        projections=values.astype(np.float32),
    )
    for name, was in before.items():
        move = 0.5 * expected[name] if name in names else 0
        np.testing.assert_allclose(coordinator.values()[name], was - move, rtol=1e-6)


def test_estimates_pass_the_optimizer_by():
    coordinator, ids = fleet(
        2, 2, zeroth_order=settings(lr=1e-3), optimizer_options={"optimizer": "AdamW"}
    )
    plan = coordinator.plan_round(1, ids)
    small = sorted(without_backward(plan))[0]
    coordinator.complete_round(plan, [projections_reply(plan, small, np.full(16, 0.1))])
    block = plan.assignments[small].block_index
    moved = abs(coordinator.values()[PARTITION.blocks[block][0]] - 1)
    # AdamW with a rate of 1 would have moved every weight by 1.
    assert 0 < moved.max() <= 1.01e-4


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("wrong-seed", {"direction-seed": 5}),
        ("malformed-report", {"direction-seed": 5.5}),
        ("wrong-kind", {"update-kind": "gradient"}),
        ("wrong-projections", {"projections": on_the_wire(np.ones(15))}),
        ("wrong-projections", {"projections": np.ones(16).tobytes()}),
        ("wrong-projections", {"projections": None}),
        ("malformed-report", {"projections": "1.0"}),
        ("non-finite", {"projections": on_the_wire(np.full(16, np.nan))}),
    ],
)
def test_bad_projections_are_refused(reason, change):
    coordinator, ids = fleet(3, 0, zeroth_order=settings(use="always"))
    plan = coordinator.plan_round(1, ids)
    device = next(iter(plan.assignments))
    reply = projections_reply(plan, device, np.ones(16))
    report = {**reply.report, **change}
    kept = {key: value for key, value in report.items() if value is not None}
    reply = replace(reply, report=kept)
    assert coordinator.complete_round(plan, [reply]).refused == {reason: 1}
    for values in coordinator.values().values():
        np.testing.assert_array_equal(values, 1)


def test_projections_that_nobody_asked_for_are_refused():
    coordinator, ids = fleet(3, 0)
    plan = coordinator.plan_round(1, ids)
    device = next(iter(plan.assignments))
    report = {
        **honest_reply(plan, device).report,
        "update-kind": "zeroth-order",
        "projections": on_the_wire(np.ones(16)),
    }
    reply = projections_reply(plan, device, np.ones(16), report=report)
    assert coordinator.complete_round(plan, [reply]).refused == {"wrong-kind": 1}


def test_a_lie_moves_no_further_than_the_largest_norm():
    moved = []
    for value in (10.0, 1e30):
        coordinator, ids = fleet(
            3, 0, zeroth_order=settings(use="always"), max_gradient_norm=10.0
        )
        plan = coordinator.plan_round(1, ids)
        device = next(iter(plan.assignments))
        reply = projections_reply(plan, device, np.full(16, value))
        coordinator.complete_round(plan, [reply])
        moved.append(coordinator.values()["head.w"].copy())
    np.testing.assert_array_equal(*moved)


@pytest.mark.parametrize(
    "changes",
    [
        {"use": "never"},
        {"num_directions": MAX_DIRECTIONS + 1},
        {"lr": 0.0},
        {"smallest_share": 0.0},
    ],
)
def test_settings_out_of_range(changes):
    with pytest.raises(UserError):
        settings(**changes)


# --- both sides ----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["full", "peqa"])
def test_devices_without_back_propagation_learn(tuning, roberta, batch):
    roberta = adapt(roberta, tuning)
    partition = model_partition(roberta)
    sizes = {"batch_size": 6, "sequence_length": 10}
    zeroth_order = ZerothOrder(
        costs=zeroth_order_costs(roberta, partition, **sizes, num_directions=16),
        use="always",
        lr=0.5,
        num_directions=16,
    )
    coordinator = coordinator_for(
        roberta,
        partition,
        costs=model_costs(roberta, partition, **sizes),
        batch_size=6,
        settings=RoundSettings(
            channel=Channel(bandwidth_hz=1e6),
            devices=DeviceOptions(zeroth_order=zeroth_order),
        ),
    )
    devices = {
        f"id-{index}": BlockDevice(
            profile=simulated_device(index, seed=1),
            load_model=lambda: (roberta, partition),
            batch_source=lambda *_: batch,
        )
        for index in range(3)
    }
    for name, device in devices.items():
        coordinator.add_device(name, device.profile.to_properties())
    frozen = fingerprint(roberta, partition.frozen)
    losses = []
    for server_round in range(1, 8):
        plan = coordinator.plan_round(server_round, devices)
        replies = []
        for name, assignment in plan.assignments.items():
            update = devices[name].train(assignment, coordinator.values())
            tensors = {n: npy(array) for n, array in update.arrays.items()}
            replies.append(
                DeviceReply(
                    name, tensors, update.num_examples, update.report.to_record()
                )
            )
        record = coordinator.complete_round(plan, replies)
        assert record.refused == {}
        losses.append(record.train_loss)
    assert losses[-1] < losses[0] - 0.003
    assert fingerprint(roberta, partition.frozen) == frozen
