"""Time per round and memory of plain FedAvg projects, and of the same on LoLa-DEFT.

Run with ``pytest simulations/benchmarks/bench_against_fedavg.py``. The projects are
those of ``tests/fedavg_apps``, switched as docs/migration.md says. As they stand, only
FedAvg evaluates on devices: the third side has LoLa-DEFT do so as well.

The time is the median of all rounds but the first, which starts the clients; start-up
is left out, too. The simulation asks for replies every 0.1 s, so that times come in
such steps; what hides in them shows in the CPU time of the server's process (the
simulation's, all but Ray's workers), a median as well. Memory is the peak of the
proportional set sizes of all processes of a run, start-up included.
"""

from __future__ import annotations

import re
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from lola_flwr.simulation import run_app
from tests.fedavg_apps.test_migration import HERE as PROJECTS
from tests.fedavg_apps.test_migration import losses, switched

psutil = pytest.importorskip("psutil")

NUM_DEVICES = 3
NUM_ROUNDS = 50
SAMPLE_S = 0.5

# What the projects print on the server before the first round and after each.
LOSS = 'print(f"held-out loss {loss:.4f}")'
STAMP = 'print(f"stamp {time.time()} {time.process_time()}")'

# The share of devices that evaluate in the plain project.
FRACTION_EVALUATE = {"message": 0.5, "legacy": 1.0}


@dataclass
class Side:
    """What a round took, and the whole run's peak."""

    round_s: float
    server_cpu_s: float
    peak_bytes: int
    first_loss: float
    last_loss: float


class PeakMemory:
    """Peak memory of all processes that start below this one, while in a context."""

    def __init__(self):
        self.peak_bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()

    def _sample(self):
        while not self._done.wait(SAMPLE_S):
            self.peak_bytes = max(self.peak_bytes, sum(self._sizes()))

    def _sizes(self):
        for process in psutil.Process().children(recursive=True):
            try:
                yield process.memory_full_info().pss
            except psutil.Error:
                continue


def replace_once(path: Path, old: str, new: str):
    text = path.read_text()
    assert text.count(old) == 1, f"{path}: {text.count(old)} times {old}"
    path.write_text(text.replace(old, new))


def measure(app: Path, home: Path) -> Side:
    server = app / "plain_app" / "server_app.py"
    replace_once(server, LOSS, f"{LOSS}\n        {STAMP}")
    replace_once(server, "import torch\n", "import time\n\nimport torch\n")
    with PeakMemory() as memory:
        finished = run_app(
            app,
            num_devices=NUM_DEVICES,
            run_config=[f"num-server-rounds={NUM_ROUNDS}"],
            home=home,
        )
    assert finished.completed, finished.output
    found = re.findall(r"stamp ([\d.]+) ([\d.]+)", finished.output)
    stamps = np.array(found, dtype=float)
    assert len(stamps) == NUM_ROUNDS + 1
    round_s, server_cpu_s = np.median(np.diff(stamps[1:], axis=0), axis=0)
    values = losses(finished.output)
    return Side(round_s, server_cpu_s, memory.peak_bytes, values[0], values[-1])


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", ["message", "legacy"])
def test_against_fedavg(kind, tmp_path, capsys):
    plain = shutil.copytree(PROJECTS / kind, tmp_path / "plain" / kind)
    evaluating = switched(kind, tmp_path / "evaluating")
    server = evaluating / "plain_app" / "server_app.py"
    text = server.read_text()
    server.write_text(
        re.sub(
            r"( strategy = LoLaDeft\(.*)\)\n",
            rf"\1, fraction_evaluate={FRACTION_EVALUATE[kind]})\n",
            text,
        )
    )
    assert server.read_text() != text
    apps = {
        "FedAvg": plain,
        "LoLa-DEFT": switched(kind, tmp_path / "switched"),
        "LoLa-DEFT, evaluating": evaluating,
    }
    sides = {name: measure(app, tmp_path / "home") for name, app in apps.items()}
    base = sides["FedAvg"]
    with capsys.disabled():
        print(f"\n{kind}: {NUM_DEVICES} SuperNodes, {NUM_ROUNDS} rounds (x: to FedAvg)")
        for name, side in sides.items():
            print(
                f"  {name:<21} {side.round_s * 1e3:4.0f} ms per round "
                f"({side.round_s / base.round_s:.2f}x), server CPU "
                f"{side.server_cpu_s * 1e3:4.0f} ms per round "
                f"({side.server_cpu_s / base.server_cpu_s:.2f}x), peak "
                f"{side.peak_bytes / 2**20:5.0f} MiB "
                f"({side.peak_bytes / base.peak_bytes:.2f}x), loss "
                f"{side.first_loss:.3f} to {side.last_loss:.3f}"
            )
