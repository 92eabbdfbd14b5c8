"""A server's round of RoBERTa-base, from the last reply to the next round's messages.

``python -m simulations.benchmarks.server_round`` prints CPU seconds of each part and the
peak of the process's memory. Run it from two checkouts to compare them.
"""

from __future__ import annotations

import json
import math
import resource
import statistics
import sys
import time
from io import BytesIO

import numpy as np
import torch
from flwr.app import Array

from lola_flwr.build import ServerStep, coordinator_for
from lola_flwr.costs.estimated import estimate_costs
from lola_flwr.model.blocks import partition_parameters
from lola_flwr.model.loading import load_classifier
from lola_flwr.server.replies import DeviceReply
from lola_flwr.system.devices import simulated_device
from lola_flwr.wire.packing import pack
from lola_flwr.wire.records import UpdateReport

NUM_DEVICES, ROUNDS = 12, 5


def main() -> None:
    """Measure some rounds."""
    torch.set_num_threads(1)
    model, _ = load_classifier("random:roberta-base", num_labels=2)
    shapes = {name: tuple(v.shape) for name, v in model.named_parameters()}
    partition = partition_parameters(shapes)
    coordinator = coordinator_for(
        model,
        partition,
        costs=estimate_costs(shapes, partition, batch_size=32, sequence_length=64),
        batch_size=32,
        step=ServerStep(lr=3e-4),
    )
    del model
    ids = [str(index) for index in range(NUM_DEVICES)]
    for index, device in enumerate(ids):
        profile = simulated_device(index, seed=0)
        coordinator.add_device(device, profile.to_properties())
    updates = [_update(shapes, partition.update_names(block)) for block in range(12)]
    coordinator.meet_devices(1, ids)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = [_round(coordinator, ids, updates, n) for n in range(1, ROUNDS + 1)]
    print(
        json.dumps(
            {
                "complete_cpu_s": statistics.median(s[0] for s in seconds[1:]),
                "messages_cpu_s": statistics.median(s[1] for s in seconds[1:]),
                "peak_above_mb": (
                    resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
                )
                / 1024,
                "digest": float(
                    sum(
                        abs(v).sum(dtype=np.float64)
                        for v in coordinator.values().values()
                    )
                ),
            }
        )
    )


def _update(shapes, names):
    stream = BytesIO()
    size = sum(math.prod(shapes[name]) for name in names)
    values = np.random.default_rng(0).standard_normal(size).astype(np.float32) * 1e-3
    np.save(stream, values, allow_pickle=False)
    return stream.getvalue()


def _round(coordinator, ids, updates, server_round):
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
    begun = time.process_time()
    record = coordinator.complete_round(plan, replies)
    assert not record.refused, record.refused
    completed = time.process_time()
    # As the Message API's strategy encodes them: all devices are sent one array.
    Array(pack(coordinator.values()))
    return completed - begun, time.process_time() - completed


if __name__ == "__main__":
    sys.exit(main())
