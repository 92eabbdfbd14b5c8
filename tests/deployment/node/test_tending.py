from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from lola_flwr.deployment.node.tending import tended
from lola_flwr.deployment.worker import ask_worker
from lola_flwr.deployment.worker_link import LinkError

SERVE = "lola_flwr.deployment.serve_worker"


@pytest.fixture
def worker(tmp_path):
    path = tmp_path / "private" / "worker.sock"
    process = subprocess.Popen([sys.executable, "-m", SERVE, "--socket", str(path)])
    while not path.exists() or not answers(path):
        assert process.poll() is None
        time.sleep(0.02)
    yield process, path
    process.kill()
    process.wait()


def answers(path):
    try:
        return ask_worker(path, "status")
    except LinkError:
        return None


def test_a_worker_that_hangs_is_ended_while_the_node_is_at_something_else(worker):
    process, path = worker
    with tended(path, look_s=0.01, hangs_s=0.3):
        os.kill(process.pid, signal.SIGSTOP)
        assert process.wait(timeout=60) == -signal.SIGKILL


def test_a_worker_that_answers_is_left_alone_and_so_is_none(worker, tmp_path):
    process, path = worker
    with (
        tended(path, look_s=0.01, hangs_s=30.0),
        tended(tmp_path / "none", look_s=0.01),
    ):
        time.sleep(0.3)
        assert process.poll() is None
        assert answers(path)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == 0
