"""The resident node beside Flower's own, with a real SuperLink."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from flwr.common.constant import ErrorCode

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PROBE = Path(__file__).parent / "probe_app"
BIN = Path(sys.executable).parent
# What Flower's own answers alike, and where it waits for a minute or for ever.
ALIKE = "count count raise count"
GONE = "ClientApp stopped responding."
OWN = "exit count nothing count"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(home):
    home.mkdir(exist_ok=True)
    return {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
    }


def wait_until(true, seconds=60):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


class Link:
    """A SuperLink on the loopback."""

    def __init__(self, directory):
        self.port, self.directory = free_port(), directory
        self.home = directory / "link"
        self.environment = environment(self.home)
        (self.home / "config.toml").write_text(
            '[superlink]\ndefault = "here"\n[superlink.here]\n'
            f'address = "127.0.0.1:{self.port}"\ninsecure = true\n'
        )
        self.programs = []
        self.start(
            ["flower-superlink", "--insecure", "--port", str(self.port)], self.home
        )
        wait_until(self.answers)

    def answers(self):
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def start(self, words, home):
        with (self.directory / f"{words[0]}.log").open("ab") as log:
            program = subprocess.Popen(
                [str(BIN / words[0]), *words[1:]],
                env=environment(home),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.programs.append(program)
        return program

    def node(self, program, *words):
        address = f"127.0.0.1:{self.port}"
        words = ["--insecure", "--superlink", address, *words]
        words += ["--node-config", "partition-id=7 num-partitions=9"]
        return self.start([*program, *words], self.directory / program[0])

    def run(self, app, asks, out, wait=True):
        command = [
            *(str(BIN / "flwr"), "run", str(app), "here", "--stream"),
            *("--run-config", f'asks="{asks}" out="{out}"'),
        ]
        process = subprocess.Popen(
            command, env=self.environment, stdout=subprocess.DEVNULL
        )
        if not wait:
            return process
        assert process.wait(timeout=300) == 0
        return json.loads(out.read_text())

    def stop(self):
        for program in reversed(self.programs):
            if program.poll() is None:
                os.killpg(program.pid, signal.SIGTERM)
                program.wait(timeout=60)


@pytest.fixture
def link(tmp_path):
    link = Link(tmp_path)
    yield link
    link.stop()


def stated(answers):
    """Return the answers without what belongs to a process."""
    own = ("seconds", "pid", "calls")
    return [{k: v for k, v in a.items() if k not in own} for a in answers]


def test_answers_are_those_of_flowers_own(link, tmp_path):
    """Values, state, errors and their words."""
    node = link.node(["flower-supernode"], "--port", str(free_port()))
    expected = link.run(PROBE, ALIKE, tmp_path / "expected.json")
    os.killpg(node.pid, signal.SIGTERM)
    node.wait(timeout=60)
    node = link.node(["lola-flwr", "node"])
    answers = link.run(PROBE, ALIKE, tmp_path / "answers.json")
    assert stated(answers) == stated(expected)
    assert [a.get("count") for a in answers] == [1, 2, None, 3]
    answers = link.run(PROBE, OWN, tmp_path / "own.json")
    assert answers[0]["error"] == [ErrorCode.CLIENT_APP_CRASHED, GONE]
    assert "no Message" in answers[2]["error"][1]
    assert [a.get("count") for a in answers] == [None, 1, None, 2]
    assert {a["pid"] for a in answers if "pid" in a} == {node.pid}
    # Of other code under the same names nothing of the first run's is left.
    other = tmp_path / "other"
    shutil.copytree(PROBE, other, ignore=shutil.ignore_patterns("__pycache__"))
    client = other / "probe" / "client_app.py"
    client.write_text(client.read_text().replace("ANSWER = 1", "ANSWER = 2"))
    (again,) = link.run(other, "count", tmp_path / "again.json")
    assert (again["answer"], again["calls"], again["count"]) == (2, 1, 1)
    assert again["pid"] == node.pid


def test_a_signal_lets_the_message_in_hand_be_answered(link, tmp_path):
    node = link.node(["lola-flwr", "node"])
    out = tmp_path / "answers.json"
    running = link.run(PROBE, "count wait", out, wait=False)
    log = tmp_path / "lola-flwr.log"
    wait_until(lambda: log.read_text().count("Receiving:") == 2)
    node.send_signal(signal.SIGTERM)
    assert node.wait(timeout=60) == 0
    assert running.wait(timeout=120) == 0
    assert json.loads(out.read_text())[1]["count"] == 2
