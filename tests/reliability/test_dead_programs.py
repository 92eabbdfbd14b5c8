"""A program of a simulation is killed: what it was is said, or the run goes on."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from lola_flwr.simulation import guard, run_app

QUICKSTART = Path(__file__).parents[2] / "simulations" / "quickstart"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def started():
    """Give this process's descendants, with their command lines."""
    table, waiting = guard.children(), [os.getpid()]
    while waiting:
        for pid in table.get(waiting.pop(), ()):
            waiting.append(pid)
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            yield pid, b" ".join(command).decode()


def run(tmp_path, killed, rounds):
    """Run the quickstart, of which one program is killed after the first round."""
    pids = []

    def echo(line):
        if "round 1:" in line and not pids:
            pids.extend(
                pid
                for pid, command in started()
                if killed in command and "guard.py" not in command
            )
            os.kill(pids[0], signal.SIGKILL)

    finished = run_app(
        QUICKSTART,
        num_devices=2,
        run_config=[f"rounds={rounds}", f'output-dir="{tmp_path / "out"}"'],
        home=tmp_path / "home",
        echo=echo,
    )
    assert pids
    return finished


@pytest.mark.parametrize(
    ("killed", "said"),
    [
        (
            "bin/flwr-simulation",
            "The process of ServerApp and devices was ended by SIGKILL",
        ),
        ("bin/flower-superlink", "flower-superlink was ended by SIGKILL"),
        ("bin/flower-superexec", "flower-superexec was ended by SIGKILL"),
        ("bin/flwr run", "flwr run was ended by SIGKILL"),
    ],
)
def test_what_ended_is_named(tmp_path, killed, said):
    # So many rounds that nothing else ends it.
    finished = run(tmp_path, killed, rounds=10_000)
    assert not finished.completed
    assert finished.error.startswith(said)


def test_a_dead_actor_costs_its_update(tmp_path):
    finished = run(tmp_path, "ray::ClientAppActor", rounds=4)
    assert finished.completed
    assert "ActorDiedError" in finished.output
