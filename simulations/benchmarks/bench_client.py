"""What a device spends on a step, RoBERTa-base shape, beside what others spend.

Run with ``pytest simulations/benchmarks/bench_client.py``. Batches of 16 x 64 tokens,
dropout on. Memory is the growth of the resident set in a process of its own, weights
included; full fine-tuning is ``transformers.Trainer`` with its AdamW.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lola_flwr.costs.memory import Levers
from lola_flwr.costs.of_model import model_costs
from lola_flwr.device.prefix import ActivationCache, reused_prefix
from lola_flwr.model.adapters import adapt
from lola_flwr.model.backprop import block_gradient, model_loss
from lola_flwr.model.loading import load_classifier
from simulations.benchmarks.client_step import (
    BATCH_SIZE,
    MODEL,
    SEQUENCE_LENGTH,
    make_batch,
    partition_of,
    timed,
)

REPEATS = 3
NUM_LAYERS = 12


def run_step(kind, **options):
    """Take steps in another process; return its peak in bytes and its fastest step."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    done = subprocess.run(
        [sys.executable, "-m", "simulations.benchmarks.client_step", kind, *flags],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    result = json.loads(done.stdout.splitlines()[-1])
    return result["peak_bytes"], min(result["seconds"], default=0.0)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    run_step("base", base=directory)
    return directory


@pytest.fixture(scope="module")
def full():
    """Peak and seconds of a step of ``transformers.Trainer``."""
    return run_step("trainer", steps=REPEATS)


@pytest.fixture(scope="module")
def costs():
    model, _ = load_classifier(MODEL, num_labels=2)
    return model_costs(
        model,
        partition_of(model),
        batch_size=BATCH_SIZE,
        sequence_length=SEQUENCE_LENGTH,
    )


@pytest.mark.timeout(3600)
def test_a_ladder_takes_little_more_than_inference(capsys):
    inference_bytes, inference_s = run_step("inference", steps=REPEATS)
    model = adapt(load_classifier(MODEL, num_labels=2)[0], "ladder")
    expected = model_costs(
        model,
        partition_of(model),
        batch_size=BATCH_SIZE,
        sequence_length=SEQUENCE_LENGTH,
    ).memory_bytes
    for depth in (1, NUM_LAYERS):
        peak_bytes, seconds = run_step("ladder", depth=depth, steps=REPEATS)
        model_bytes = expected[NUM_LAYERS - depth]
        with capsys.disabled():
            print(
                f"\nladder, block {NUM_LAYERS - depth:2d} {mb(peak_bytes)} and "
                f"{seconds:.2f} s, {peak_bytes / inference_bytes:.3f} and "
                f"{seconds / inference_s:.2f} times inference ({mb(inference_bytes)}); "
                f"cost model {model_bytes / peak_bytes:.3f} of it",
                end="",
            )
        assert peak_bytes <= 1.3 * inference_bytes
        assert 0.9 <= model_bytes / peak_bytes <= 1.1


def mb(num_bytes):
    return f"{num_bytes / 1e6:7.1f} MB"


@pytest.mark.timeout(3600)
def test_peak_memory_is_what_the_cost_model_says(base, full, costs):
    full_bytes, _ = full
    print(f"\nfull fine-tuning (Trainer, AdamW) {mb(full_bytes)}")
    ratios, off = {}, []
    ways = [("block", 0), ("streamed", 0), ("block", 4), ("streamed", 4)]
    for kind, size in ways:
        depths = range(1, NUM_LAYERS + 1) if size == 0 else (1, NUM_LAYERS)
        for depth in depths:
            levers = Levers(size or BATCH_SIZE, stream_prefix=kind == "streamed")
            expected = costs.step.peak_bytes(levers)[NUM_LAYERS - depth]
            peak, _ = run_step(kind, depth=depth, micro_batch_size=size, base=base)
            ratios[kind, size, depth] = peak / full_bytes
            off.append(peak / expected - 1)
            print(
                f"{kind:8s} depth {depth:2d} micro-batch {size or BATCH_SIZE:2d}: "
                f"{mb(peak)}, cost model {mb(expected)} ({100 * off[-1]:+.1f} %); "
                f"{100 * peak / full_bytes:.1f} % of full fine-tuning"
            )
    assert ratios["streamed", 0, 1] <= 0.25
    assert ratios["streamed", 0, NUM_LAYERS] <= 0.60
    assert np.abs(off).max() <= 0.10


@pytest.mark.timeout(3600)
def test_step_time(costs):
    model, _ = load_classifier(MODEL, num_labels=2)
    model.train()
    partition, batch = partition_of(model), make_batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def full_step():
        optimizer.zero_grad()
        model_loss(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    def block_step(depth, cache=None):
        index = partition.num_blocks - depth
        if cache is None:
            return lambda: block_gradient(model, partition, index, batch)

        def step():
            with reused_prefix(model, partition, index, cache):
                block_gradient(model, partition, index, batch)

        return step

    seconds = {"full": []}
    # All in turn, so that a busy spell of the machine hits them alike.
    for repeat in range(REPEATS + 1):
        fastest = {"full": timed(full_step)}
        for depth in (1, 6):
            cache = ActivationCache(10**9)
            fastest["plain", depth] = timed(block_step(depth))
            fastest["cold", depth] = timed(block_step(depth, cache))
            fastest["warm", depth] = timed(block_step(depth, cache))
            assert cache.hits == BATCH_SIZE
        if repeat:  # the first one also fills caches
            for key, value in fastest.items():
                seconds.setdefault(key, []).append(value)
    seconds = {key: min(values) for key, values in seconds.items()}
    full_s = seconds["full"]
    print(f"\nfull step (forward, backward, clipping, AdamW) {full_s:.3f} s")
    for depth, limit in ((1, 0.15), (6, 0.50)):
        # Layers forward, back, and the block's weights, of 12 layers three times.
        ideal = (depth + (depth - 1) + 2) / (3 * NUM_LAYERS)
        plain, cold, warm = (seconds[kind, depth] for kind in ("plain", "cold", "warm"))
        print(
            f"depth {depth}: warm {warm:.3f} s, {100 * warm / full_s:.1f} % of full "
            f"(operations: {100 * ideal:.1f} %); cold {cold:.3f} s, "
            f"{cold / plain:.3f} of plain {plain:.3f} s"
        )
        assert warm <= limit * full_s
        assert cold <= 1.05 * plain


@pytest.mark.timeout(3600)
def test_beside_peers(base, full, compared):
    rows = [
        ("transformers.Trainer, all weights", full),
        ("peft LoRA r=8, through Trainer", run_step("lora", steps=REPEATS)),
    ]
    for depth in (1, 6, NUM_LAYERS):
        for kind in ("block", "streamed"):
            result = run_step(kind, depth=depth, steps=REPEATS, base=base)
            rows.append((f"lola-flwr, depth {depth}, {kind}", result))
    for name, (peak, seconds) in rows:
        print(
            f"{name:36s} {seconds:6.2f} s a step ({seconds / full[1]:.2f}), "
            f"{mb(peak)} ({peak / full[0]:.2f})"
        )
        if name.startswith("lola-flwr"):
            compared(name, seconds, "transformers.Trainer", full[1])
            compared(name, peak / 1e6, "transformers.Trainer", full[0] / 1e6, "MB")
