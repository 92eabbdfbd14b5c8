"""Steps of an adapted model in a process of its own; prints one line of JSON.

Run with ``python -m simulations.benchmarks.tuning_step MODEL TUNING``, as bench_paca
does.
"""

from __future__ import annotations

import argparse
import json

import torch
import transformers

from lola_flwr.machine.heap import give_back_freed_memory, keep_no_freed_memory
from lola_flwr.machine.memory import (
    peak_memory_bytes,
    reset_peak_memory,
    resident_memory_bytes,
)
from lola_flwr.model.adapters import adapt
from lola_flwr.model.backprop import block_gradient
from simulations.benchmarks.client_step import load, make_batch, partition_of

# All linear maps of the layers, for every tuning alike.
TARGETS = r".*\.layer\.\d+\..*(query|key|value|dense)"
OPTIONS = {
    "lora": {"r": 8, "lora_alpha": 16},
    "paca": {"r": 8},
    "svfit": {},
    "lamda": {"r": 8},
    "peqa": {},
}


def adapted(model, tuning):
    """Put adapters into a model, or into what has its name."""
    options = {**OPTIONS[tuning], "target_modules": TARGETS}
    model = load(model) if isinstance(model, str) else model
    return adapt(model, tuning, options).train()


def step(model, block=None):
    """Return what computes the gradient of a block; None: of all of them, at once."""
    partition = partition_of(model)
    blocks = range(partition.num_blocks) if block is None else [block]
    batch = make_batch()
    return lambda: block_gradient(
        model, partition, [index % partition.num_blocks for index in blocks], batch
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("tuning", choices=OPTIONS)
    parser.add_argument("--block", type=int)
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    keep_no_freed_memory()
    # What a process loads in its first step is no part of what a step takes.
    step(adapted("random:roberta-tiny", args.tuning))()
    give_back_freed_memory()
    before = resident_memory_bytes()
    run = step(adapted(args.model, args.tuning), args.block)
    give_back_freed_memory()
    model_bytes = resident_memory_bytes() - before
    if not reset_peak_memory():
        raise SystemExit("The peak of a process can be measured on Linux alone.")
    run()
    peak_bytes = peak_memory_bytes() - before
    print(json.dumps({"peak_bytes": peak_bytes, "model_bytes": model_bytes}))


if __name__ == "__main__":
    main()
