"""Coordinators of three blocks, and honest replies to what they ask for."""

from __future__ import annotations

import math
from dataclasses import replace
from io import BytesIO

import numpy as np

from lola_flwr.costs.estimated import estimate_costs
from lola_flwr.model.blocks import partition_parameters
from lola_flwr.server.coordinator import Coordinator
from lola_flwr.server.replies import DeviceReply
from lola_flwr.system.devices import simulated_device
from lola_flwr.wire.records import UpdateReport
from tests.flat_settings import coordinator_of

SHAPES = {
    "embed.w": (9, 4),
    **{f"layer.{n}.{name}": (4, 4) for n in range(3) for name in ("up", "down")},
    "head.w": (2, 4),
}
PARTITION = partition_parameters(SHAPES)


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


def fleet_of_equals(count, **options):
    """Devices that differ in nothing, so that only what they do can set them apart."""
    coordinator = make_coordinator(num_devices=0, **options)
    for index in range(count):
        properties = {"flops-per-s": 1e6, "memory-bytes": 1e9, "snr-db": 60.0}
        coordinator.add_device(f"id-{index}", {"name": f"d{index}", **properties})
    return coordinator, [f"id-{index}" for index in range(count)]
