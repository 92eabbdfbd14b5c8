"""``lola-flwr simulate`` up to the point where Flower's programs are started."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from lola_flwr import simulation
from lola_flwr.cli.console import plain_line
from lola_flwr.cli.live import RunView, duration
from lola_flwr.cli.main import main
from lola_flwr.errors import UserError
from lola_flwr.run.records import BlockRecord, RoundRecord
from lola_flwr.run.round_log import RoundLog
from lola_flwr.simulation import FinishedRun

APP = """
[project]
name = "app"

[tool.flwr.app.config]
rounds = 3
num-devices = 0
fleet = ""
output-dir = ""
"""


# In Flower's engine, whose programs the tests stand in for.
SIMULATE = ("simulate", "app", "--engine", "ray")


@pytest.fixture
def app(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "pyproject.toml").write_text(APP)
    return tmp_path / "app"


@pytest.fixture
def started(monkeypatch):
    """What `run_app` is called with; the run completes at once."""
    calls = []

    def run_app(app, **options):
        calls.append(options)
        return FinishedRun("finished:completed", "INFO :     final: loss=1\n")

    monkeypatch.setattr(simulation, "run_app", run_app)
    return calls


def test_the_app_is_told_what_the_command_knows(app, started, capsys):
    assert main([*SIMULATE, "--devices", "4", "rounds=2"]) == 0
    (call,) = started
    assert call["num_devices"] == 4
    assert {"rounds=2", "num-devices=4"} < set(call["run_config"])
    (output,) = [w for w in call["run_config"] if w.startswith("output-dir=")]
    assert f'"{app.parent}/runs/app-' in output
    assert capsys.readouterr().out.splitlines()[-1] == "final: loss=1"


def test_output_directory_of_the_users_own(app, started):
    assert main([*SIMULATE, "--devices", "4", "--out", "mine"]) == 0
    assert f'output-dir="{app.parent}/mine"' in started[0]["run_config"]


def test_a_fleet_says_how_many(app, started):
    assert main(["fleet", "generate", "5", "--out", "fleet.toml"]) == 0
    assert main([*SIMULATE, "--fleet", "fleet.toml"]) == 0
    assert started[0]["num_devices"] == 5
    assert f'fleet="{app.parent}/fleet.toml"' in started[0]["run_config"]


def test_an_app_without_these_keys(app, started):
    path = app / "pyproject.toml"
    path.write_text("[tool.flwr.app.config]\nrounds = 3\n")
    assert main([*SIMULATE, "--devices", "2"]) == 0
    assert started[0]["run_config"] == []


@pytest.mark.parametrize(
    ("devices", "engine", "in_ray"),
    [(16, "auto", False), (17, "auto", True), (17, "process", False)],
)
def test_few_devices_are_simulated_in_one_process(
    app, started, capsys, devices, engine, in_ray
):
    words = ["simulate", "app", "--engine", engine, "--devices", str(devices)]
    assert main(words) == (0 if in_ray else 1)
    assert len(started) == in_ray
    if not in_ray:
        assert capsys.readouterr().err == (
            "error: app names no serverapp in [tool.flwr.app.components].\n"
        )


def test_json(app, started, capsys):
    assert main([*SIMULATE, "--devices", "4", "--json"]) == 0
    assert started[0]["echo"] is None
    outcome = json.loads(capsys.readouterr().out)
    assert outcome["status"] == "finished:completed"
    assert outcome["final"] == "final: loss=1"


def test_a_run_ends_with_its_report(app, monkeypatch, capsys):
    def run_app(_, *, run_config, **options):
        (output,) = [w for w in run_config if w.startswith("output-dir=")]
        log = RoundLog(Path(json.loads(output.partition("=")[2])) / "rounds.jsonl")
        log.append(RoundRecord(1, 2, 3.0, metrics={"accuracy": 0.5}))
        return FinishedRun("finished:completed", "INFO :     final: loss=1\n")

    monkeypatch.setattr(simulation, "run_app", run_app)
    assert main([*SIMULATE, "--devices", "4", "--out", "mine"]) == 0
    assert f"report: {app.parent}/mine/report.html" in capsys.readouterr().out
    assert "accuracy" in (app.parent / "mine" / "report.html").read_text()


def test_a_failed_run_is_a_failed_command(app, monkeypatch, capsys):
    failed = FinishedRun("finished:failed", "ERROR :     error: no model\n")
    monkeypatch.setattr(simulation, "run_app", lambda *_, **__: failed)
    assert main([*SIMULATE, "--devices", "4"]) == 1
    assert capsys.readouterr().err == "error: no model\n"


class TestMaskedErrors:
    """What goes wrong beside a run never takes the place of the run's own mistake."""

    MISTAKE = FinishedRun("finished:failed", "ERROR :     error: Too few devices\n")

    @pytest.fixture
    def ends(self, app, monkeypatch):
        """Let the run leave some rounds and end in some way."""

        def end(finished, rounds="", *, error=None):
            def run_app(_, *, run_config, **options):
                if error is not None:
                    raise error
                (output,) = [w for w in run_config if w.startswith("output-dir=")]
                directory = Path(json.loads(output.partition("=")[2]))
                directory.mkdir()
                (directory / "rounds.jsonl").write_text(rounds)
                return finished

            monkeypatch.setattr(simulation, "run_app", run_app)
            return [*SIMULATE, "--devices", "4", "--out", "mine"]

        return end

    @pytest.mark.parametrize("rounds", ["", "nonsense\n", "{}\n"])
    def test_a_run_that_failed(self, ends, rounds, capsys):
        command = ends(self.MISTAKE, rounds)
        assert main(command) == 1
        *before, last = capsys.readouterr().err.splitlines()
        assert last == "error: Too few devices"
        # A run that fails in its first round has nothing to report.
        assert len(before) == bool(rounds)
        assert all(line.startswith("warning: no report: ") for line in before)

    @pytest.mark.parametrize("rounds", ["", "nonsense\n"])
    def test_json_says_it(self, ends, rounds, capsys):
        assert main([*ends(self.MISTAKE, rounds), "--json"]) == 1
        said = capsys.readouterr()
        outcome = json.loads(said.out)
        assert outcome["status"] == "finished:failed"
        assert outcome["error"] == "Too few devices"
        assert outcome["report"] is None
        assert said.err.splitlines()[-1] == "error: Too few devices"

    def test_json_says_what_kept_the_run_from_starting(self, ends, capsys):
        command = [*ends(None, error=UserError("no superlink")), "--json"]
        assert main(command) == 1
        outcome = json.loads(capsys.readouterr().out)
        assert outcome["status"] == "not started"
        assert outcome["error"] == "no superlink"
        assert main([*command, "rouns=3"]) == 1
        assert "Did you mean 'rounds'" in json.loads(capsys.readouterr().out)["error"]

    def test_a_run_without_a_word(self, ends, capsys):
        assert main([*ends(FinishedRun("finished:stopped", "")), "--json"]) == 1
        said = json.loads(capsys.readouterr().out)["error"]
        assert said == "the run is finished:stopped"

    def test_a_completed_run_stays_completed_without_its_report(self, ends, capsys):
        completed = FinishedRun("finished:completed", "INFO :     final: loss=1\n")
        assert main(ends(completed, "nonsense\n")) == 0
        said = capsys.readouterr()
        assert said.out.splitlines()[-1] == "final: loss=1"
        assert said.err.startswith("warning: no report: ")
        assert "line 1 is no record of a round" in said.err


class TestLive:
    def record(self, number):
        block = BlockRecord(
            block_index=0,
            depth=1,
            device="[red]phone",
            share=1.0,
            compute_s=1.0,
            upload_s=3.0,
            reported_compute_s=1.0,
            compute_clock="measured",
            loss=0.5,
            status="accepted",
        )
        return RoundRecord(
            number,
            1,
            4.0 * number,
            round_s=4.0,
            observed_s=4.0,
            train_loss=0.5,
            blocks=(block,),
            metrics={"accuracy": 0.25 * number},
        )

    def shown(self, view, width=120):
        out = io.StringIO()
        Console(file=out, width=width).print(view)
        return out.getvalue()

    def test_it_follows_the_file(self, tmp_path):
        view = RunView(tmp_path / "rounds.jsonl", 3)
        assert "waiting for the first round" in self.shown(view)
        log = RoundLog(tmp_path / "rounds.jsonl")
        for number in (1, 2):
            log.append(self.record(number))
            shown = self.shown(view)
            assert f"round {number} of 3" in shown
            assert f"accuracy {0.25 * number:.4f}" in shown
        # What a device calls itself is no markup.
        assert "[red]phone" in shown
        assert "▒" * 8 + "█" * 24 in shown

    def test_a_skipped_round_says_why(self, tmp_path):
        log = RoundLog(tmp_path / "rounds.jsonl")
        log.append(RoundRecord(1, 0, 0.0, skipped="nobody is there"))
        assert "nobody is there" in self.shown(RunView(log.path, 3))

    def test_a_file_that_is_none_does_not_end_the_run(self, tmp_path):
        path = tmp_path / "rounds.jsonl"
        path.write_text("nonsense\n")
        assert "waiting" in self.shown(RunView(path, None))

    def test_it_forecasts_the_end(self, tmp_path):
        now = [0.0]
        view = RunView(tmp_path / "rounds.jsonl", 12, clock=lambda: now[0])
        log = RoundLog(tmp_path / "rounds.jsonl")
        # Until the first round, the model is loaded: that is no part of the pace.
        for number, seconds in ((1, 500.0), (2, 520.0)):
            now[0] = seconds
            log.append(self.record(number))
            shown = self.shown(view)
            assert ("left" in shown) == (number == 2)
        assert "9 min here   about 3 min left, until " in shown
        assert "8.0 s wireless time" in shown
        # The round that goes on is counted down, and no further than to its end.
        now[0] = 660.0
        assert "about 60 s left" in self.shown(view)
        now[0] = 9999.0
        assert "about 0 s left" in self.shown(view)
        log.append(self.record(12))
        assert "left" not in self.shown(view)

    def test_rounds_of_before_are_no_pace(self, tmp_path):
        log = RoundLog(tmp_path / "rounds.jsonl")
        log.append(self.record(1))
        now = [0.0]
        view = RunView(log.path, 4, clock=lambda: now[0])
        assert "round 1 of 4" in self.shown(view)
        for number, seconds in ((2, 100.0), (3, 110.0)):
            now[0] = seconds
            log.append(self.record(number))
            shown = self.shown(view)
            assert ("about 10 s left" in shown) == (number == 3)

    def test_narrow_terminals_lose_nothing(self, tmp_path):
        log = RoundLog(tmp_path / "rounds.jsonl")
        for number in (1, 2):
            log.append(self.record(number))
        words = " ".join(self.shown(RunView(log.path, 3), width=48).split())
        for part in ("round 2 of 3", "8.0 s wireless time", "accuracy 0.5000 ▁█"):
            assert part in words

    def test_a_metric_that_is_no_number(self, tmp_path):
        log = RoundLog(tmp_path / "rounds.jsonl")
        for number, value in ((1, 0.25), (2, float("nan")), (3, 0.5)):
            log.append(replace(self.record(number), metrics={"accuracy": value}))
        assert "accuracy 0.5000 ▁█" in self.shown(RunView(log.path, 3))


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (99, "99 s"),
        (100, "2 min"),
        (5940, "99 min"),
        (11100, "3 h 5 min"),
    ],
)
def test_durations(seconds, words):
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("line", "plain"),
    [
        ("\x1b[92mINFO \x1b[0m:      round 1\n", "round 1"),
        ("\x1b[92mINFO \x1b[0m:        block 0\n", "  block 0"),
        ("\x1b[92mINFO \x1b[0m:      \n", ""),
        ("\x1b[93mWARNING \x1b[0m:   slow\n", "WARNING :   slow"),
        ("INFORMATION: x\n", "INFORMATION: x"),
    ],
)
def test_piped_lines_are_plain(line, plain):
    assert plain_line(line) == plain


def test_what_is_printed_into_a_pipe(app, monkeypatch, capsys):
    def run_app(_, *, echo, **options):
        echo("\x1b[92mINFO \x1b[0m:      round 1\n")
        return FinishedRun("finished:completed", "INFO :     final: loss=1\n")

    monkeypatch.setattr(simulation, "run_app", run_app)
    assert main([*SIMULATE, "--devices", "4"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "round 1"


def test_a_finished_run_says_where_everything_is(app, monkeypatch, capsys):
    directory = app.parent / "mine"

    def run_app(_, **options):
        log = RoundLog(directory / "rounds.jsonl")
        log.append(RoundRecord(1, 2, 3.0, metrics={"accuracy": 0.5}))
        for name in ("merged/config.json", "other/adapter_config.json", "no-model/x"):
            (directory / name).parent.mkdir()
            (directory / name).touch()
        return FinishedRun("finished:completed", "INFO :     final: loss=1\n")

    monkeypatch.setattr(simulation, "run_app", run_app)
    command = [*SIMULATE, "--devices", "4", "--out", "mine"]
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"files: {directory}",
        f"rounds: {directory}/rounds.jsonl",
        f"model: {directory}/merged",
        f"model: {directory}/other",
        f"report: {directory}/report.html",
        "final: loss=1",
    ]
    shutil.rmtree(directory)
    assert main([*command, "--json"]) == 0
    outcome = json.loads(capsys.readouterr().out)
    assert outcome["rounds"] == f"{directory}/rounds.jsonl"
    assert outcome["models"] == [f"{directory}/merged", f"{directory}/other"]
