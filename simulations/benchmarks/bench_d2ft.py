"""What a step under D2FT's schedule costs: operations, seconds, activations, messages.

MiniLM-L6, 42 examples of 32 tokens, one thread. Run with
``pytest simulations/benchmarks/bench_d2ft.py -s``.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from lola_flwr.costs.counter import saved_bytes
from lola_flwr.d2ft.find import find_subnetworks
from lola_flwr.d2ft.operations import Operation
from lola_flwr.d2ft.schedule import (
    FULL_TUNING,
    Budgets,
    Scores,
    operation_values,
    schedule_subnetworks,
)
from lola_flwr.d2ft.training import scheduled_gradient, split_batch
from lola_flwr.model.adapter_blocks import model_partition
from lola_flwr.model.loading import load_classifier
from simulations.compare.measure import counted_flops

EXAMPLES = 42
SCHEDULES = {
    "everything": (6, Budgets(), False),
    "60 % compute, the same micro-batches": (7, Budgets(compute=0.6), True),
    "50 % traffic, the same micro-batches": (6, Budgets(traffic=0.5), True),
    "60 % compute, their own": (7, Budgets(compute=0.6), False),
    "50 % traffic, their own": (6, Budgets(traffic=0.5), False),
}


def test_cost_of_a_step():
    model, _ = load_classifier("minilm-l6", num_labels=2)
    partition = model_partition(model)
    subnetworks = find_subnetworks(model, partition)
    batch = {
        "input_ids": torch.randint(5, 1000, (EXAMPLES, 32)),
        "labels": torch.zeros(EXAMPLES, dtype=torch.long),
    }
    works = {}
    for name, (count, budgets, same) in SCHEDULES.items():
        shape = subnetworks.count, count
        chance = np.random.default_rng(0).random((1, count) if same else shape)
        alike = Scores(
            np.ones(shape), np.ones(shape[0]), np.broadcast_to(chance, shape)
        )
        own = np.arange(shape[0])
        operations = schedule_subnetworks(operation_values(alike, own), own, budgets)
        runs = np.flatnonzero((operations != Operation.SKIP).any(axis=0))
        parts = [split_batch(batch, count)[index] for index in runs]
        trained = partition.trainable
        works[name] = (
            (model, subnetworks, trained, parts, operations[:, runs]),
            np.array(FULL_TUNING.traffic)[operations].sum() / operations.size / 2,
        )
    seconds = {name: [] for name in works}
    for _ in range(4):  # in turn: the machine's other work meets all of them
        for name, (work, _) in works.items():
            start = time.perf_counter()
            scheduled_gradient(*work)
            seconds[name].append(time.perf_counter() - start)
    print("\n| schedule | FLOP | | s | | saved MiB | messages |")
    whole = None
    for name, (work, messages) in works.items():
        _, flops = counted_flops(scheduled_gradient, *work)
        saved = saved_bytes(model, lambda work=work: scheduled_gradient(*work))
        fastest = min(seconds[name][1:])
        whole = whole or (flops, fastest)
        print(
            f"| {name} | {flops / 1e9:.1f} G | {flops / whole[0]:.0%} | {fastest:.2f} "
            f"| {fastest / whole[1]:.0%} | {saved / 2**20:.0f} | {messages:.0%} |"
        )
        assert flops <= whole[0]
