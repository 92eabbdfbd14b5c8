"""Time that the strategy itself takes in a round of many devices, clients apart.

Run with ``pytest simulations/benchmarks/bench_strategy.py``.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from lola_flwr.costs.estimated import estimate_costs
from lola_flwr.model.blocks import partition_parameters
from lola_flwr.model.loading import load_classifier
from lola_flwr.optimizer import ServerOptimizer
from lola_flwr.planning import AllocationOptions
from lola_flwr.server.coordinator import Coordinator
from lola_flwr.server.model import ServedModel
from lola_flwr.server.settings import RoundSettings
from lola_flwr.system.devices import simulated_device
from simulations.benchmarks.server_replies import replies_to, update_of


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
    sizes = [
        sum(math.prod(shapes[n]) for n in partition.update_names(block))
        for block in range(partition.num_blocks)
    ]
    # None twice, which would be refused.
    rounds = iter(
        [
            (number, [update_of(np.full(s, 1e-3 + 1e-6 * number, "f4")) for s in sizes])
            for number in range(1, 23)
        ]
    )

    def one_round():
        server_round, updates = next(rounds)
        coordinator.meet_devices(server_round, ids)
        plan = coordinator.plan_round(server_round, ids)
        return coordinator.complete_round(plan, replies_to(plan, updates))

    record = benchmark.pedantic(one_round, rounds=20, warmup_rounds=2)
    assert not record.refused
