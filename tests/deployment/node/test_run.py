"""The resident node beside Flower's own, with a real SuperLink."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from flwr.common.constant import ErrorCode

from tests.deployment.node.links import Link, free_port, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PROBE = Path(__file__).parent / "probe_app"
BIN = Path(sys.executable).parent
# What Flower's own answers alike, and where it waits for a minute or for ever.
ALIKE = "count count raise count"
GONE = "ClientApp stopped responding."
OWN = "exit count nothing count"


def ask(link, app, asks, out):
    """Run the app, and return what it was answered."""
    link.run(app, f'asks="{asks}" out="{out}"')
    return json.loads(out.read_text())


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
    expected = ask(link, PROBE, ALIKE, tmp_path / "expected.json")
    os.killpg(node.pid, signal.SIGTERM)
    node.wait(timeout=60)
    node = link.node(["lola-flwr", "node"])
    answers = ask(link, PROBE, ALIKE, tmp_path / "answers.json")
    assert stated(answers) == stated(expected)
    assert [a.get("count") for a in answers] == [1, 2, None, 3]
    answers = ask(link, PROBE, OWN, tmp_path / "own.json")
    assert answers[0]["error"] == [ErrorCode.CLIENT_APP_CRASHED, GONE]
    assert "no Message" in answers[2]["error"][1]
    assert [a.get("count") for a in answers] == [None, 1, None, 2]
    assert {a["pid"] for a in answers if "pid" in a} == {node.pid}
    # Of other code under the same names nothing of the first run's is left.
    other = tmp_path / "other"
    shutil.copytree(PROBE, other, ignore=shutil.ignore_patterns("__pycache__"))
    client = other / "probe" / "client_app.py"
    client.write_text(client.read_text().replace("ANSWER = 1", "ANSWER = 2"))
    (again,) = ask(link, other, "count", tmp_path / "again.json")
    assert (again["answer"], again["calls"], again["count"]) == (2, 1, 1)
    assert again["pid"] == node.pid


def test_a_signal_lets_the_message_in_hand_be_answered(link, tmp_path):
    node = link.node(["lola-flwr", "node"])
    out = tmp_path / "answers.json"
    running = link.run(PROBE, f'asks="count wait" out="{out}"', wait=False)
    log = tmp_path / "lola-flwr.log"
    wait_until(lambda: log.read_text().count("Receiving:") == 2)
    node.send_signal(signal.SIGTERM)
    assert node.wait(timeout=60) == 0
    assert running.wait(timeout=120) == 0
    assert json.loads(out.read_text())[1]["count"] == 2
