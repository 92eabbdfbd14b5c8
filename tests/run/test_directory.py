"""Where a run's files are, and how to get its report."""

from __future__ import annotations

import shlex

import pytest

from lola_flwr.cli.main import main
from lola_flwr.run.directory import say_where
from lola_flwr.run.records import RoundRecord
from lola_flwr.run.round_log import RoundLog
from tests.reliability.tiny_run import run


@pytest.mark.parametrize("name", ["out", "my runs"])
def test_the_line_names_a_command_that_writes_the_report(tmp_path, caplog, name):
    log = RoundLog(tmp_path / name / "rounds.jsonl")
    with caplog.at_level("INFO", logger="flwr"):
        say_where(log.path)
        # A run that failed in its first round has nothing to report.
        assert caplog.messages == []
        log.append(RoundRecord(1, 2, 3.0))
        say_where(log.path)
    (line,) = caplog.messages
    assert str(log.path) in line
    program, *words = shlex.split(line.rpartition(": ")[2])
    assert program == "lola-flwr"
    assert main(words) == 0
    assert (tmp_path / name / "report.html").is_file()


def test_a_run_ends_with_that_line(tmp_path, caplog):
    with caplog.at_level("INFO", logger="flwr"):
        run(tmp_path, num_rounds=1)
    assert f"lola-flwr report {tmp_path}" in caplog.messages[-1]
