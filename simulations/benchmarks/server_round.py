"""A server's round of RoBERTa-base, from the last reply to the next round's messages.

``python -m simulations.benchmarks.server_round`` prints, as JSON, CPU seconds of each
part, beside those of a copy of the trained values into memory that is there; the memory
that completing a round takes at its peak; and how long a checkpoint keeps it waiting.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from flwr.app import Array

from lola_flwr.build import ServerStep, coordinator_for
from lola_flwr.costs.estimated import estimate_costs
from lola_flwr.machine.heap import give_back_freed_memory
from lola_flwr.model.blocks import partition_parameters
from lola_flwr.model.loading import load_classifier
from lola_flwr.run.directory import RunDirectory
from lola_flwr.system.devices import simulated_device
from simulations.benchmarks.server_replies import replies_to, update_of

NUM_DEVICES, ROUNDS = 12, 6


def main() -> None:
    """Measure some rounds."""
    torch.set_num_threads(1)
    coordinator, sizes = _server()
    ids = [*coordinator.state.fleet.profiles]
    figures = []
    with (
        tempfile.TemporaryDirectory() as directory,
        RunDirectory(Path(directory) / "run", coordinator, configuration={}) as files,
    ):
        for server_round in range(1, ROUNDS + 1):
            # None twice, which would be refused.
            updates = [_update(size, server_round) for size in sizes]
            figures.append(_round(coordinator, ids, updates, server_round, files))
            del updates
            # As between the rounds of a run; training leaves time for the checkpoint.
            give_back_freed_memory()
            time.sleep(10)
    # The first makes the optimizer's state.
    means = {name: median(f[name] for f in figures[1:]) for name in figures[0]}
    print(json.dumps({name: round(value, 4) for name, value in means.items()}))


def _server():
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
    ids = [str(index) for index in range(NUM_DEVICES)]
    coordinator.meet_devices(1, ids)
    for index, device in enumerate(ids):
        profile = simulated_device(index, seed=0)
        coordinator.add_device(device, profile.to_properties())
    return coordinator, [
        sum(math.prod(shapes[name]) for name in partition.update_names(block))
        for block in range(partition.num_blocks)
    ]


def _update(size, seed):
    values = np.random.default_rng(seed).standard_normal(size, np.float32)
    return update_of(values * np.float32(1e-3))


def _round(coordinator, ids, updates, server_round, files):
    plan = coordinator.plan_round(server_round, ids)
    replies = replies_to(plan, updates)
    values = coordinator.values()
    source = np.ones(sum(v.size for v in values.values()), np.float32)
    there = np.ones_like(source)
    begun = time.process_time()
    np.copyto(there, source)
    copied_s = time.process_time() - begun
    del source, there
    before = _memory_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    begun = time.process_time()
    record = coordinator.complete_round(plan, replies)
    completed_s = time.process_time() - begun
    assert not record.refused, record.refused
    peak = _memory_bytes("VmHWM") - before
    begun = time.process_time()
    packed = coordinator.packed([*values])
    packed_s = time.process_time() - begun
    # As the Message API's strategy does it for all devices at once.
    begun = time.process_time()
    Array(packed)
    encoded_s = time.process_time() - begun
    begun = time.perf_counter()
    files.on_round(record)
    return {
        "memcpy_cpu_s": copied_s,
        "complete_cpu_s": completed_s,
        "pack_cpu_s": packed_s,
        "encode_cpu_s": encoded_s,
        "complete_peak_mb": peak / 1e6,
        "checkpoint_waits_s": time.perf_counter() - begun,
    }


def _memory_bytes(field):
    """Return a line of what Linux says of this process's memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{field}:")]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    sys.exit(main())
