"""A run that is stopped and started again ends as one that never was."""

from __future__ import annotations

import copy
import json
import os
import signal
import stat
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest

from lola_flwr.errors import UserError
from lola_flwr.run import directory
from lola_flwr.run.checkpoint import Snapshot
from lola_flwr.run.digest import data_digest
from lola_flwr.run.directory import RunDirectory, describe_run
from lola_flwr.run.records import RoundRecord
from lola_flwr.simulation import run_app
from tests.marks import rest_slow
from tests.reliability.tiny_run import run

ROOT = Path(__file__).parent.parent.parent


def records(directory):
    lines = (directory / "rounds.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith("measured")}
        for line in lines
    ]


def assert_same_end(one, other):
    """Everything that is checkpointed is equal, but for the devices' ids."""
    first, second = one.snapshot(), other.snapshot()
    assert first.arrays.keys() == second.arrays.keys()
    for name, array in first.arrays.items():
        np.testing.assert_array_equal(array, second.arrays[name], strict=True)
    states = [copy.deepcopy(snapshot.values["state"]) for snapshot in (first, second)]
    profiles = [sorted(s["fleet"].pop("profiles").values(), key=str) for s in states]
    assert states[0] == states[1]
    assert profiles[0] == profiles[1]
    for key in ("steps", "groups"):
        values = [s.values["optimizer"][key] for s in (first, second)]
        # What has been through JSON has lists for tuples.
        assert json.dumps(values[0]) == json.dumps(values[1])


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A run of 6 rounds, and its directory."""
    directory = tmp_path_factory.mktemp("unbroken")
    return run(directory, num_rounds=6), directory


@pytest.mark.parametrize(
    ("before", "after"),
    rest_slow([("legacy", "message"), ("message", "message"), ("message", "legacy")]),
)
def test_a_run_goes_on_where_it_stopped(unbroken, tmp_path, before, after):
    run(tmp_path, num_rounds=3, interface=before)
    again = run(tmp_path, num_rounds=6, interface=after, first_node=9000)
    assert_same_end(again, unbroken[0])
    assert records(tmp_path) == records(unbroken[1])


def test_a_finished_run_does_nothing_more(unbroken):
    again = run(unbroken[1], num_rounds=6, num_devices=1)
    assert_same_end(again, unbroken[0])
    assert len(records(unbroken[1])) == 6


@pytest.mark.slow
def test_with_a_random_allocator(tmp_path):
    options = {"allocator": "random"}
    whole = run(tmp_path / "whole", num_rounds=6, options=options)
    run(tmp_path / "parts", num_rounds=3, options=options)
    assert_same_end(run(tmp_path / "parts", num_rounds=6, options=options), whole)


def test_the_round_that_was_cut_off_is_dropped_from_the_log(unbroken, tmp_path):
    run(tmp_path, num_rounds=4)
    (tmp_path / "checkpoints" / "round-000004.safetensors").unlink()
    with (tmp_path / "rounds.jsonl").open("a") as file:
        file.write('{"server_round": 5, "num_de')
    run(tmp_path, num_rounds=6)
    assert records(tmp_path) == records(unbroken[1])


def test_a_damaged_checkpoint_is_passed_over_loudly(unbroken, tmp_path, caplog):
    run(tmp_path, num_rounds=4)
    last = tmp_path / "checkpoints" / "round-000004.safetensors"
    os.truncate(last, last.stat().st_size - 1)
    with caplog.at_level("WARNING", logger="flwr"):
        again = run(tmp_path, num_rounds=6)
    assert any(
        "passed over" in line and "round-000004" in line for line in caplog.messages
    )
    assert_same_end(again, unbroken[0])


@pytest.mark.slow
def test_without_any_good_checkpoint_nothing_is_overwritten(tmp_path):
    run(tmp_path, num_rounds=4)
    for path in (tmp_path / "checkpoints").iterdir():
        os.truncate(path, 10)
    with pytest.raises(UserError, match=r"None of the 3 checkpoints"):
        run(tmp_path, num_rounds=5)
    assert len(records(tmp_path)) == 4


def test_another_configuration_is_named_and_refused(tmp_path):
    run(tmp_path, num_rounds=1, configuration={"lr": 0.1, "task": "cola"})
    with pytest.raises(
        UserError, match=r"lr=0\.2 instead of 0\.1; seed=1 instead of None"
    ):
        run(
            tmp_path, num_rounds=2, configuration={"lr": 0.2, "task": "cola", "seed": 1}
        )


def test_other_data_are_refused_with_both_digests_or_allowed_by_name(tmp_path):
    def go_on(**options):
        with RunDirectory(tmp_path, Rounds(), configuration={}, **options):
            pass

    then, now = data_digest([["a", 0], ["b", 1]]), data_digest([["a", 1], ["b", 0]])
    go_on(data=then)
    go_on(data=then)
    with pytest.raises(UserError, match=f"of digest {then}, not {now}. .*other-data="):
        go_on(data=now)
    go_on(data=now, other_data=True)


def test_other_versions_are_warned_of_and_kept(tmp_path, caplog, monkeypatch):
    describe_run(tmp_path, app="app", config={}, server_round=0)
    for server_round, torch_version in ((0, "1"), (7, "2"), (9, "2")):
        monkeypatch.setattr(
            directory, "_version", {"torch": torch_version}.get, raising=True
        )
        describe_run(tmp_path, app="app", config={}, server_round=server_round)
    described = json.loads((tmp_path / "run.json").read_text())
    assert described["versions"]["torch"] == "2"
    (earlier,) = described["earlier_versions"]
    assert (earlier["through_round"], earlier["torch"]) == (7, "1")
    (warning,) = [line for line in caplog.messages if "were run with" in line]
    assert warning.startswith("rounds up to 7 were run with torch 1: ")


def test_a_run_s_directory_is_its_owner_s_alone(tmp_path):
    with RunDirectory(tmp_path / "runs" / "one", Rounds(), configuration={}):
        pass
    assert stat.S_IMODE((tmp_path / "runs" / "one").stat().st_mode) == 0o700
    describe_run(tmp_path / "two", app="app", config={})
    assert stat.S_IMODE((tmp_path / "two").stat().st_mode) == 0o700


class Rounds:
    """Nothing that depends on anything."""

    server_round = 0

    def snapshot(self):
        return Snapshot({}, {})

    def restore(self, snapshot):
        pass


def test_there_is_a_checkpoint_after_the_last_round(tmp_path):
    rounds = Rounds()
    with RunDirectory(tmp_path, rounds, configuration={}, every=2, last=3) as files:
        for rounds.server_round in range(1, 4):
            files.on_round(RoundRecord(rounds.server_round, 1, 0.0))
    names = sorted(path.stem for path in (tmp_path / "checkpoints").iterdir())
    assert names == [f"round-00000{number}" for number in (0, 2, 3)]


def test_checkpoints_every_zero_rounds_are_refused(tmp_path):
    with pytest.raises(UserError, match="every=0 must be at least 1"):
        RunDirectory(tmp_path, None, configuration={}, every=0)


@pytest.mark.slow
def test_rounds_without_checkpoints_are_not_overwritten(tmp_path):
    (tmp_path / "rounds.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="holds the rounds of an earlier run"):
        run(tmp_path, num_rounds=1)
    (tmp_path / "rounds.jsonl").unlink()
    run(tmp_path, num_rounds=1)
    (tmp_path / "rounds.jsonl").write_text("")
    with pytest.raises(UserError, match="lacks rounds"):
        run(tmp_path, num_rounds=2)


def in_child(function):
    """Run a function in a process of its own; return its id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            function()
            code = 0
        finally:
            os._exit(code)
    return child


@pytest.mark.slow
def test_a_directory_serves_one_process(tmp_path):
    def hang(record):
        if record.server_round == 1:
            (tmp_path / "there").touch()
            time.sleep(60)

    child = in_child(lambda: run(tmp_path, num_rounds=2, on_round=hang))
    try:
        while not (tmp_path / "there").exists():
            time.sleep(0.01)
        with pytest.raises(UserError, match="Another process runs in"):
            run(tmp_path, num_rounds=2)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    # The lock went with the process.
    run(tmp_path, num_rounds=2)


@pytest.mark.slow
@pytest.mark.parametrize("interface", ["message", "legacy"])
def test_killed_at_25_random_moments_a_run_ends_with_the_same_weights(
    tmp_path, interface, rng
):
    worked_on = tmp_path / "worked_on"  # a line for each round that was begun
    worked_on.touch()

    def note(server_round):
        with worked_on.open("a") as file:
            file.write(f"{server_round}\n")

    def note_and_never_end(server_round):
        note(server_round)
        if server_round == 20:  # however late the kill comes, it finds somebody
            time.sleep(60)

    def go_on(start, on_plan=note_and_never_end):
        return run(
            tmp_path / "run",
            num_rounds=20,
            interface=interface,
            first_node=100 * (1 + start),
            on_plan=on_plan,
        )

    for kill in range(25):
        begun = len(worked_on.read_text())
        child = in_child(partial(go_on, kill))
        if rng.random() < 0.8:
            # Somewhere in a round; else it may be as early as in reading a checkpoint.
            while len(worked_on.read_text()) == begun:
                time.sleep(1e-3)
        time.sleep(rng.uniform(0.0, 0.1))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL, "it must not have ended before"
    assert_same_end(go_on(25, note), run(tmp_path / "unbroken", num_rounds=20))
    assert records(tmp_path / "run") == records(tmp_path / "unbroken")
    begun = [int(line) for line in worked_on.read_text().split()]
    # After a kill the round that it struck is done again, and the one before if its
    # checkpoint was still being written.
    steps = np.diff(begun)
    assert set(steps) <= {-1, 0, 1}
    assert begun[0] == 1 and begun[-1] == 20
    assert 0 < np.sum(steps < 1) <= 25


GLUE = ROOT / "simulations" / "glue"
TINY = ('model="random:roberta-tiny"', "batch-size=8", "rounds=12", "num-devices=5")


def stop_after(num_rounds, log, overrides, home):
    """Start the app; when its log has so many rounds, kill all that was started."""
    command = [sys.executable, str(ROOT / "simulations" / "run.py"), str(GLUE)]
    command += ["--devices", "5", "--engine", "ray", "--home", str(home), *overrides]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while not log.exists() or log.read_text().count("\n") < num_rounds:
            assert process.poll() is None, "it has ended by itself"
            time.sleep(1e-3)
        # The server, the simulation, its workers: nobody has time to tidy up.
        family = psutil.Process(process.pid)
        for one in [*family.children(recursive=True), family]:
            with suppress(psutil.NoSuchProcess):
                one.kill()


@pytest.mark.slow
@pytest.mark.parametrize("interface", ["legacy", "message"])
def test_flower_runs_killed_three_times_end_with_the_same_model(tmp_path, interface):
    def overrides(name):
        output = f'output-dir="{tmp_path}/{name}"'
        return [*TINY, f'interface="{interface}"', "save-model=true", output]

    home = tmp_path / "home"
    log = tmp_path / "killed" / "rounds.jsonl"
    for num_rounds in (1, 3, 4):
        stop_after(num_rounds, log, overrides("killed"), home)
        assert len(records(tmp_path / "killed")) < 12
    for name in ("killed", "unbroken"):
        finished = run_app(GLUE, num_devices=5, run_config=overrides(name), home=home)
        assert finished.completed, finished.output
    assert records(tmp_path / "killed") == records(tmp_path / "unbroken")
    saved = [
        (tmp_path / name / "model" / "model.safetensors").read_bytes()
        for name in ("killed", "unbroken")
    ]
    assert saved[0] == saved[1]
    # Another configuration has no business there.
    other = [*overrides("killed"), "lr=0.5"]
    finished = run_app(GLUE, num_devices=5, run_config=other, home=home)
    assert finished.error is not None
    assert "another configuration: lr=0.5 instead of 0.0003" in finished.error
