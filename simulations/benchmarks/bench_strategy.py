"""Time that the strategy itself takes in a round of many devices, clients apart.

Run with ``pytest simulations/benchmarks/bench_strategy.py``.
"""

from __future__ import annotations

import math
from io import BytesIO

import numpy as np
import pytest

from lola_flwr.costs.estimated import estimate_costs
from lola_flwr.model.blocks import partition_parameters
from lola_flwr.model.loading import load_classifier
from lola_flwr.optimizer import ServerOptimizer
from lola_flwr.planning import AllocationOptions
from lola_flwr.server.coordinator import Coordinator
from lola_flwr.server.model import ServedModel
from lola_flwr.server.replies import DeviceReply
from lola_flwr.server.settings import RoundSettings
from lola_flwr.system.devices import simulated_device
from lola_flwr.wire.records import UpdateReport


@pytest.mark.parametrize("num_devices", [200, 2_000])
def test_round_of_a_tiny_model(benchmark, num_devices):
    model, _ = load_classifier("random:roberta-tiny", num_labels=2)
    parameters = dict(model.named_parameters())
    shapes = {name: tuple(values.shape) for name, values in parameters.items()}
    partition = partition_parameters(shapes)
    values = {name: parameters[name].numpy(force=True) for name in partition.trainable}
    coordinator = Coordinator(
        ServedModel(partition, ServerOptimizer(values, lr=3e-4), base_fingerprint=""),
        estimate_costs(shapes, partition, batch_size=32, sequence_length=64),
        settings=RoundSettings(allocation=AllocationOptions(rotation_eps=0.1)),
    )
    ids = [str(index) for index in range(num_devices)]
    for index, device in enumerate(ids):
        profile = simulated_device(index, seed=0)
        coordinator.add_device(device, profile.to_properties())
    updates = []
    for block in range(partition.num_blocks):
        size = sum(math.prod(shapes[n]) for n in partition.update_names(block))
        stream = BytesIO()
        np.save(stream, np.full(size, 1e-3, np.float32), allow_pickle=False)
        updates.append(stream.getvalue())
    rounds = iter(range(1, 10**6))

    def one_round():
        server_round = next(rounds)
        coordinator.meet_devices(server_round, ids)
        plan = coordinator.plan_round(server_round, ids)
        replies = [
            DeviceReply(
                device_id=device,
                tensors=[updates[task.block_index]],
                num_examples=32,
                report=UpdateReport(
                    server_round=server_round,
                    block_index=task.block_index,
                    update_kind="gradient",
                    loss=0.7,
                    compute_s=1.0,
                    compute_clock="simulated",
                ).to_record(),
            )
            for device, task in plan.assignments.items()
        ]
        return coordinator.complete_round(plan, replies)

    record = benchmark.pedantic(one_round, rounds=20, warmup_rounds=2)
    assert not record.refused
