"""A step of PaCA beside one of LoRA, of the same rank on the same matrices.

Run with ``pytest simulations/benchmarks/bench_paca.py -o python_files='bench_*.py'``.
MiniLM-L6 and RoBERTa-base's shape, 16 examples of 64 tokens, one thread, dropout on,
r=8 on all linear maps of the layers. Times are seconds of the CPU, so that what else
runs on the machine is in neither, taken in turn, of which the fastest counts. Memory is
the largest resident set of a process, less that before the model was made; of each step
one process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers

from lola_flwr.costs.of_model import model_costs
from simulations.benchmarks.client_step import partition_of
from simulations.benchmarks.tuning_step import adapted, step

MODELS = {"MiniLM-L6": "minilm-l6", "RoBERTa-base": "random:roberta-base"}
BLOCKS = {"all blocks": None, "first block": 0, "last block": -1}
REPEATS = 3
MOST_MEMORY = 0.85
# The wider a matrix, the less LoRA adds to it.
MOST_TIME = {"MiniLM-L6": 0.85, "RoBERTa-base": 0.9}


def memory_bytes(model, tuning, block):
    """Take a step in another process; return its peak and the model's part of it."""
    flags = [] if block is None else [f"--block={block}"]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "simulations.benchmarks.tuning_step"),
            *(model, tuning, *flags),
        ],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    told = json.loads(done.stdout.splitlines()[-1])
    return told["peak_bytes"], told["model_bytes"]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", MODELS)
def test_time(name, compared):
    torch.set_num_threads(1)
    models = {tuning: adapted(MODELS[name], tuning) for tuning in ("paca", "lora")}
    for kind, block in BLOCKS.items():
        steps = {tuning: step(model, block) for tuning, model in models.items()}
        for run in steps.values():
            run()
        seconds = dict.fromkeys(steps, float("inf"))
        for _ in range(REPEATS):
            for tuning, run in steps.items():
                start = time.process_time()
                run()
                taken = time.process_time() - start
                seconds[tuning] = min(seconds[tuning], taken)
        work = f"a step of PaCA, {name}, {kind}"
        compared(work, seconds["paca"], "LoRA", seconds["lora"])
        if block is None:
            assert seconds["paca"] <= MOST_TIME[name] * seconds["lora"]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", MODELS)
def test_memory(name, compared):
    for kind, block in BLOCKS.items():
        (ours, own_model), (theirs, model) = (
            memory_bytes(MODELS[name], tuning, block) for tuning in ("paca", "lora")
        )
        work = f"peak of PaCA, {name}, {kind}"
        compared(work, ours / 1e6, "LoRA", theirs / 1e6, "MB")
        step_bytes, of_lora = ours - own_model, theirs - model
        compared(
            f"{work}, weights apart", step_bytes / 1e6, "LoRA", of_lora / 1e6, "MB"
        )
        if block is None:
            assert ours <= MOST_MEMORY * theirs


@pytest.mark.parametrize("tuning", ["paca", "svfit", "lamda", "peqa"])
def test_counted(tuning, compared):
    """What a device's step and upload come to, counted without weights."""
    config = transformers.RobertaConfig(
        vocab_size=50_265, max_position_embeddings=514, type_vocab_size=1
    )
    found = {}
    for name in (tuning, "lora"):
        with torch.device("meta"):
            model = transformers.RobertaForSequenceClassification(config)
        model = adapted(model, name)
        partition = partition_of(model)
        costs = model_costs(model, partition, batch_size=16, sequence_length=64)
        sizes = {n: parameter.nbytes for n, parameter in model.named_parameters()}
        found[name] = (
            costs.flops[0] / 1e9,
            costs.memory_bytes[0] / 1e6,
            sum(sizes[n] for n in partition.blocks[0]) / 1e3,
        )
    rows = zip(
        ("operations", "memory", "a block's upload"),
        ("GFLOP", "MB", "kB"),
        *(found[name] for name in (tuning, "lora")),
        strict=True,
    )
    for what, unit, ours, theirs in rows:
        compared(f"{tuning}, first block, {what}", ours, "LoRA", theirs, unit)
    if tuning in ("svfit", "peqa"):
        assert found[tuning][2] < 30
