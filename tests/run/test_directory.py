"""Where a run's files are, and how to get its report."""

from __future__ import annotations

import os

import pytest

from lola_flwr.cli.main import main
from lola_flwr.run.directory import run_directory, say_where
from lola_flwr.run.records import RoundRecord
from lola_flwr.run.round_log import RoundLog
from tests.reliability.tiny_run import run


@pytest.mark.parametrize("home", [".flwr", "flower"])
def test_the_line_names_a_command_that_writes_the_report(
    tmp_path, caplog, monkeypatch, home
):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("FLWR_HOME", raising=False)
    if home != ".flwr":
        monkeypatch.setenv("FLWR_HOME", f"~/{home}")
    log = RoundLog(run_directory("", 47) / "rounds.jsonl")
    with caplog.at_level("INFO", logger="flwr"):
        say_where(log.path)
        # A run that failed in its first round has nothing to report.
        assert caplog.messages == []
        log.append(RoundRecord(1, 2, 3.0))
        say_where(log.path)
    (line,) = caplog.messages
    program, *words = line.rpartition(": ")[2].split()
    assert program == "lola-flwr"
    assert main([os.path.expandvars(word) for word in words]) == 0
    assert (tmp_path / home / "lola-flwr" / "47" / "report.html").is_file()


def test_a_run_ends_with_that_line(tmp_path, caplog):
    with caplog.at_level("INFO", logger="flwr"):
        run(tmp_path, num_rounds=1)
    assert f"lola-flwr report …/{tmp_path.name}" in caplog.messages[-1]
