"""Time per round and memory of plain FedAvg projects, and of the same on LoLa-DEFT.

Run with ``pytest simulations/benchmarks/bench_against_fedavg.py``. The projects are
those of ``tests/fedavg_apps``, switched as docs/migration.md says: with their own small
model, where all that counts is what a strategy needs itself, and with a wide one of
50 MB. Without device evaluation LoLa-DEFT sends half the messages, so both evaluate.

The time is the median of all rounds but the first, which starts the clients; start-up
is left out, too. A simulation hands messages out, and FedAvg asks for replies, every
0.1 s, so that times come in such steps; what hides in them shows in the CPU time of the
server's process (the simulation's, all but Ray's workers), a median as well. Memory is
the peak of the proportional set sizes of all processes of a run, start-up included.
Both sides run several times in turn; the range of a figure is its noise.
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
NUM_ROUNDS = {"small model": 30, "wide model": 12}
# Fleets, under Ray on all cores, and their rounds; a fleet's data are as many parts.
FLEETS = {12: 16, 100: 8, 500: 5}
SAMPLE_S = 0.5

# What the projects print on the server before the first round and after each.
LOSS = 'print(f"held-out loss {loss:.4f}")'
STAMP = 'print(f"stamp {time.time()} {time.process_time()}")'

# Width of the project's model, and of one whose weights weigh on every side.
WIDTHS = {"small model": 16, "wide model": 2048}
REPEATS = 2


@dataclass
class Side:
    """What a round took, and the whole run's peak."""

    round_s: float
    server_cpu_s: float
    peak_bytes: float
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


def prepare(app: Path, width: int) -> Path:
    """Let a project print times, and give its model a width."""
    server = app / "plain_app" / "server_app.py"
    replace_once(server, LOSS, f"{LOSS}\n        {STAMP}")
    replace_once(server, "import torch\n", "import time\n\nimport torch\n")
    task = app / "plain_app" / "task.py"
    lines = [
        re.sub(r"\b16\b", str(width), line) if " nn." in line else line
        for line in task.read_text().splitlines(keepends=True)
    ]
    task.write_text("".join(lines))
    return app


def measure(
    app: Path, home: Path, num_rounds: int, num_devices: int = NUM_DEVICES
) -> Side:
    with PeakMemory() as memory:
        finished = run_app(
            app,
            num_devices=num_devices,
            run_config=[f"num-server-rounds={num_rounds}", "lr=0.02"],
            home=home,
        )
    assert finished.completed, finished.output
    found = re.findall(r"stamp ([\d.]+) ([\d.]+)", finished.output)
    stamps = np.array(found, dtype=float)
    assert len(stamps) == num_rounds + 1
    round_s, server_cpu_s = np.median(np.diff(stamps[1:], axis=0), axis=0)
    last_loss = losses(finished.output)[-1]
    return Side(round_s, server_cpu_s, memory.peak_bytes, last_loss)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("size", WIDTHS)
@pytest.mark.parametrize("kind", ["message", "legacy"])
def test_against_fedavg(kind, size, tmp_path, capsys, compared):
    plain = shutil.copytree(PROJECTS / kind, tmp_path / "plain" / kind)
    apps = {"FedAvg": plain, "LoLa-DEFT": switched(kind, tmp_path / "switched")}
    for app in apps.values():
        prepare(app, WIDTHS[size])
    rounds = NUM_ROUNDS[size]
    sides = {name: [] for name in apps}
    for _ in range(REPEATS):
        for name, app in apps.items():
            sides[name].append(measure(app, tmp_path / "home", rounds))
    with capsys.disabled():
        print(
            f"\n{kind}, {size}: {NUM_DEVICES} SuperNodes, {rounds} rounds, median of "
            f"{REPEATS} runs (range; x: to FedAvg)"
        )
        for name, runs in sides.items():
            figures = {
                "ms per round": ("round_s", 1e3),
                "ms server CPU": ("server_cpu_s", 1e3),
                "MiB peak": ("peak_bytes", 2**-20),
            }
            parts = []
            for unit, (field, scale) in figures.items():
                own, base = (
                    [scale * getattr(side, field) for side in side_runs]
                    for side_runs in (runs, sides["FedAvg"])
                )
                parts.append(
                    f"{np.median(own):.0f} {unit} ({min(own):.0f} to {max(own):.0f}; "
                    f"{np.median(own) / np.median(base):.2f}x)"
                )
            print(f"  {name:<9} {', '.join(parts)}, loss {runs[-1].last_loss:.3f}")
    compare(compared, f"{kind}, {size}", sides)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("num_devices", FLEETS)
def test_fleets(num_devices, tmp_path, compared):
    plain = shutil.copytree(PROJECTS / "message", tmp_path / "plain" / "message")
    apps = {"FedAvg": plain, "LoLa-DEFT": switched("message", tmp_path / "switched")}
    sides = {name: [] for name in apps}
    for app in apps.values():
        prepare(app, WIDTHS["small model"])
    for _ in range(REPEATS):
        for name, app in apps.items():
            home, rounds = tmp_path / "home", FLEETS[num_devices]
            sides[name].append(measure(app, home, rounds, num_devices))
    compare(compared, f"{num_devices} devices under Ray", sides)


def compare(compared, work: str, sides: dict[str, list[Side]]) -> None:
    """Put a round's time and the peak memory into the table."""
    for field, what, unit, scale in (
        ("round_s", "a round", "s", 1.0),
        ("peak_bytes", "peak memory", "MiB", 2**-20),
    ):
        ours, theirs = (
            scale * float(np.median([getattr(side, field) for side in sides[name]]))
            for name in ("LoLa-DEFT", "FedAvg")
        )
        compared(f"{work}: {what}", ours, "Flower's FedAvg", theirs, unit)
