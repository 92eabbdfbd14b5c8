"""Peak memory of a step on adapters over a base of 4 bits, beside Trainer's.

Run with ``pytest simulations/benchmarks/bench_adapter_memory.py -s``. RoBERTa-base
shape, LoRA of rank 8 on queries and values, 32 examples of 128 tokens, dropout on, on
Linux. Each row is a process of its own. Its memory is the largest resident set during
the step less that before the model was made, when everything was imported and a small
model had been trained: weights, activations, gradients. The gradient is of all 32
examples in every row; a device short of memory computes it 8 at a time, and runs layers
twice.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

AT_A_TIME = "--micro-batch-size=8"
FIRST, LAST = "--block=0", "--block=-1"

ROWS = {
    "Trainer": ["trainer"],
    "Trainer, accumulating": ["trainer", AT_A_TIME],
    "Trainer, accumulating, checkpoints": ["trainer", AT_A_TIME, "--recompute"],
    "last block, whole batch": ["device", LAST],
    "first block, whole batch": ["device", FIRST],
    "first block, whole batch, twice": ["device", FIRST, "--recompute"],
    "last block": ["device", LAST, AT_A_TIME],
    "first block": ["device", FIRST, AT_A_TIME],
    "first block, twice": ["device", FIRST, AT_A_TIME, "--recompute"],
}


def run(flags):
    """Take a step in another process; return what it says."""
    done = subprocess.run(
        [sys.executable, "-m", "simulations.benchmarks.adapter_step", *flags],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.timeout(3600)
def test_peak_memory(capsys):
    peaks = {}
    for name, flags in ROWS.items():
        result = run(flags)
        peaks[name] = result["peak_bytes"]
        with capsys.disabled():
            print(
                f"\n{name:34s} {peaks[name] / 1e6:7.1f} MB, of which the model "
                f"{result['model_bytes'] / 1e6:5.1f}: "
                f"{100 * peaks[name] / peaks['Trainer']:5.1f} % of Trainer's; "
                f"{result['values'][0]:.0f} s",
                end="",
            )
    assert peaks["last block"] <= 0.12 * peaks["Trainer"]
    assert peaks["first block"] <= 0.60 * peaks["Trainer"]
    assert peaks["first block, twice"] <= 0.5 * peaks["first block"]


@pytest.mark.timeout(3600)
def test_the_gradient_is_the_same():
    (off,) = run(["both", FIRST, "--batch-size=4"])["values"]
    assert off <= 1e-6
