"""Runs of the GLUE app whose records are kept: what they are, and how they are made.

``python -m tests.recordings`` makes all of them anew, in this directory;
``python -m tests.recordings int8 demo`` some. On one machine the same code leaves every
file as it is, bit for bit: ``git diff`` then shows what a change did.

The configurations say what the app is told, in its own keys, and nothing else of the
library is named: what is inside may change. Devices compute in simulated time.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.reliability.app_run import run_app

DIRECTORY = Path(__file__).parent
CHECKOUT = DIRECTORY.parent.parent

# Times of the machine that the server runs on, and so not recorded: to plan a round and
# step the model, and to take a step of D2FT.
MACHINE_TIMES = frozenset(
    {"measured_strategy_s", "measured_s", "measured_round_s", "measured_deadline_s"}
)

# Large steps, so that a wrong one shows; devices that are not what they say.
_BASE = {
    "model": "random:roberta-tiny",
    "num_devices": 4,
    "batch_size": 4,
    "rounds": 4,
    "eval_every": 2,
    "lr": 1e-2,
    "profile_error": 0.3,
    "compute_jitter": 0.2,
}

FAST = {
    "legacy": {"interface": "legacy"},
    "message": {},
    "lora": {"tuning": "lora", "tuning_options": "r=4"},
    # The target leaves two of the three blocks that the selector chose.
    "owlore": {
        "selector": "owlore",
        "selector_options": "count=3, period=2, max_staleness=3",
        "latency_target_s": 0.012,
    },
    # Its own model of time knows neither errors nor jitter.
    "d2ft": {
        "method": "d2ft",
        "d2ft_options": "traffic=0.5, micro_batches=4, audit_share=0",
        "profile_error": 0.0,
        "compute_jitter": 0.0,
    },
}

SLOW = {
    "int8": {"codec": "int8"},
    # Two devices of the fleet have no memory for back-propagation.
    "zeroth-order": {
        "zeroth_order": "fallback",
        "zeroth_order_options": "lr=1e-3, num_directions=4, smallest_share=0.5",
        "fleet": str(DIRECTORY / "fleet.toml"),
    },
    # Where some blocks rest there is something that has not changed.
    "downlink-changed": {
        "downlink": "changed",
        "selector": "round-robin",
        "selector_options": "count=2",
    },
    # As what was stopped after two rounds would have gone on. Devices keep nothing:
    # what they hold, a run that goes on would send them anew.
    "resumed": {
        "num_devices": 6,
        "tuning": "lora",
        "tuning_options": "r=2",
        "rotation_eps": 0.5,
        "selector": "slimfit",
        "selector_options": "count=2",
    },
    "zeroth-order-always": {
        "zeroth_order": "always",
        "zeroth_order_options": "lr=1e-3, num_directions=4",
    },
    "low-rank": {"low_rank": "rank=4, period=2"},
    "rotation": {"rotation_eps": 0.5, "num_devices": 6},
    "codec-auto": {"codec": "auto"},
    "head-rotating": {"head": "rotating"},
    "legacy-int8-changed": {
        "interface": "legacy",
        "codec": "int8",
        "downlink": "changed",
        "selector": "slimfit",
        "selector_options": "count=2",
    },
    "lora-codec-auto": {
        "tuning": "lora",
        "tuning_options": "r=4",
        "codec": "auto",
        "head": "shallowest",
        "rotation_eps": 0.2,
        "num_devices": 5,
    },
    "importance": {
        "selector": "ist",
        "selector_options": "count=2",
        "proxy_examples": 16,
    },
    "spares": {
        "num_devices": 10,
        "devices_per_block": 2,
        "backups": 1,
        "block_mean": "median",
        "schedule": "linear",
        "partitioning": "dirichlet",
    },
    "all-devices": {
        "num_devices": 6,
        "participation": "all",
        "allocator": "crunch+shares",
        "codec": "topk:0.1",
        "micro_batch_size": 2,
        "sampler": "entropy",
    },
    "fedavg-full": {"method": "fedavg-full", "norm_factor": 0.0},
}

# Directory of a run of the first version that was recorded. It is no recording to make
# anew with a later version: that one has to go on with it, or to refuse.
STOPPED = DIRECTORY / "stopped"

# What `make demo` simulates.
DEMO = (
    *("simulations/glue", "--devices", "6", "batch-size=auto", "codec=auto"),
    *("downlink=changed", "downlink-codec=int2", "downlink-channel=broadcast"),
    *("own-examples=0", "eval-every=2", 'target="accuracy>=0.83"'),
)


def configuration(name):
    """Return what the app is told."""
    return {**_BASE, **{**FAST, **SLOW}[name]}


def replay(name, directory, **overrides):
    """Run a configuration in this process; return its records as dicts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLWR_HOME", str(directory / "home"))
        return run_app(directory / "out", **{**configuration(name), **overrides})


def replay_demo(directory):
    """Run the demo as its command does; return its records as dicts."""
    out = directory / "out"
    command = [sys.executable, "simulations/run.py", *DEMO, "--out", str(out)]
    finished = subprocess.run(
        [*command, "--home", str(directory / "home")],
        cwd=CHECKOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-2000:]
    return read_records(out / "rounds.jsonl")


def read_records(path):
    """Return the records of a file, as dicts."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def recorded(name):
    """Return what was recorded."""
    return read_records(DIRECTORY / f"{name}.jsonl")


def record(name):
    """Run a configuration, or the demo, and keep its records."""
    with tempfile.TemporaryDirectory() as directory:
        run = replay_demo if name == "demo" else lambda d: replay(name, d)
        records = run(Path(directory))
    lines = [
        json.dumps({k: v for k, v in r.items() if k not in MACHINE_TIMES}) + "\n"
        for r in records
    ]
    (DIRECTORY / f"{name}.jsonl").write_text("".join(lines))


def stop():
    """Run the first rounds of a configuration, and keep its directory."""
    with tempfile.TemporaryDirectory() as directory:
        replay("resumed", Path(directory), rounds=2)
        # What names this process, or where it ran.
        ignore = shutil.ignore_patterns("lock", "run.json")
        shutil.copytree(Path(directory) / "out", STOPPED, ignore=ignore)
