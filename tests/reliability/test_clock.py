"""A step of the wall clock ends no round early, delays none, and teaches nothing."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import struct
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
from flwr.supercore.task_identity import TaskIdentity

from lola_flwr.strategies.deadline_grid import DeadlineGrid
from tests.deployment.node.links import BIN, Link, free_port, wait_until
from tests.strategies.test_arrival_grid import Slow, ask

GLUE = Path(__file__).parents[2] / "simulations" / "glue"
HOUR_S = 3600.0
DEVICES, ROUNDS = 2, 40
RESTART_S, TIMEOUT_S = 2.0, 60.0
# Programs are started with this process's environment.
STARTING = threading.Lock()


class Clock:
    """A wall clock that can be stepped under the programs that are started with it."""

    def __init__(self, shim, path):
        self._path = path
        self._environment = {"LD_PRELOAD": str(shim), "CLOCK_STEP": str(path)}
        self.step(0.0)

    def step(self, seconds):
        """Set it off from the host's by so much."""
        with os.fdopen(os.open(self._path, os.O_RDWR | os.O_CREAT), "r+b") as file:
            file.write(struct.pack("d", seconds))

    def start(self, monkeypatch, begin):
        """Start programs under it."""
        with monkeypatch.context() as patch:
            for name, value in self._environment.items():
                patch.setenv(name, value)
            return begin()


@pytest.fixture
def clocks(tmp_path):
    """Return the server's clock, and a device's."""
    source, shim = Path(__file__).with_name("clock_step.c"), tmp_path / "clock.so"
    command = ["cc", "-shared", "-fPIC", "-O1", "-o", shim, source, "-ldl"]
    subprocess.run(command, check=True)
    return [Clock(shim, tmp_path / name) for name in ("server", "device")]


class Supervised:
    """A node that is started again whenever it ends, as by its unit."""

    def __init__(self, start):
        self._start, self._over = start, threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self):
        while not self._over.is_set():
            with STARTING:
                node = self._start()
            while node.poll() is None and not self._over.wait(0.2):
                pass
            self._over.wait(RESTART_S)

    def __enter__(self):
        self._thread.start()

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(
    shutil.which("cc") is None or sys.platform != "linux", reason="needs a C compiler"
)
def test_rounds_go_on_when_clocks_are_stepped(clocks, tmp_path, monkeypatch):
    """Flower refuses who has another time, and ends a run when its own is stepped."""
    server, device = clocks
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    link = server.start(monkeypatch, lambda: Link(tmp_path))
    log = tmp_path / "out" / "rounds.jsonl"

    def rounds():
        lines = log.read_text().split("\n") if log.exists() else [""]
        # The last one is being written.
        return [json.loads(line) for line in lines[:-1]]

    def after(number):
        wait_until(lambda: len(rounds()) >= number or run.poll() is not None, 300)
        assert run.poll() is None, "the run has ended"

    def node(index):
        where = {"partition": (index, DEVICES)}
        start = partial(
            link.node, ["lola-flwr", "node"], "--port", str(free_port()), **where
        )
        return partial(device.start, monkeypatch, start) if index == 0 else start

    words = ["serve", GLUE, "here", "model=random:roberta-tiny", "interface=message"]
    words += ["num-devices=2", "batch-size=4", "max-length=16", f"rounds={ROUNDS}"]
    words += [
        "eval-every=100",
        f"round-timeout-s={TIMEOUT_S}",
        f"output-dir={tmp_path / 'out'}",
    ]
    try:
        with Supervised(node(0)), Supervised(node(1)), ExitStack() as ending:
            run = subprocess.Popen([BIN / "lola-flwr", *words], env=link.environment)
            ending.callback(run.terminate)
            after(3)
            device.step(HOUR_S)
            after(6)
            device.step(0.0)
            after(10)
            server.step(HOUR_S)
            time.sleep(10)
            server.step(0.0)
            assert run.wait(600) == 0
    finally:
        link.stop()
    assert [r["server_round"] for r in rounds()] == [*range(1, ROUNDS + 1)]
    assert took_part(rounds()[-15:]) == DEVICES
    for record in rounds():
        longest_s = record["measured_deadline_s"] or TIMEOUT_S
        # Beside that: the wait for devices, and for their profiles.
        assert record["measured_round_s"] < longest_s + 120 < HOUR_S / 4
        # And nothing was learnt of hours.
        assert max(record["round_s"], record["observed_s"]) < HOUR_S / 4


def took_part(records):
    """Return how many devices' updates were taken."""
    blocks = [block for record in records for block in record["blocks"]]
    return len({b["device"] for b in blocks if b["status"] == "accepted"})


def test_replies_are_waited_for_by_no_wall_clock(monkeypatch):
    """It is an hour later with every look, and an hour earlier with the next."""
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    hours = itertools.cycle((0.0, HOUR_S, -HOUR_S))
    now_s = time.time
    monkeypatch.setattr(time, "time", lambda: now_s() + next(hours))
    grid = DeadlineGrid(Slow({1: 0.3, 2: None}, {1: 0.0}), wait_s=lambda came_s, _: 1.0)
    begun_s = time.monotonic()
    replies = grid.send_and_receive(ask([1, 2]))
    assert [reply.metadata.src_node_id for reply in replies] == [1]
    # Neither at once nor in an hour.
    assert 1.0 <= time.monotonic() - begun_s < HOUR_S
    assert 0.3 <= grid.arrivals["1"].answered_s <= 1.0
