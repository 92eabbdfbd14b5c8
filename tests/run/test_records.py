"""Records of rounds on file."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from lola_flwr.errors import UserError
from lola_flwr.run.records import BlockRecord, RoundRecord, StepRecord
from lola_flwr.run.round_log import RoundLog, read_rounds, require_training

BLOCK = BlockRecord(
    block_index=1,
    depth=2,
    device="phone",
    share=0.5,
    compute_s=1.0,
    upload_s=2.0,
    reported_compute_s=None,
    compute_clock="",
    loss=None,
    status="no reply",
)
RECORDS = [
    RoundRecord(
        1,
        3,
        3.0,
        bound_s=2.5,
        blocks=(BLOCK,),
        metrics={"accuracy": 0.5},
        start_metrics={"accuracy": 0.25},
        round_s=3.0,
    ),
    RoundRecord(2, 3, 3.0, skipped="nobody there", refused={"late": 2}),
]


@pytest.fixture
def path(tmp_path):
    log = RoundLog(tmp_path / "run" / "rounds.jsonl")
    for record in RECORDS:
        log.append(record)
    return log.path


@pytest.mark.parametrize(
    ("records", "why"),
    [
        ([], "there was no round"),
        (RECORDS[:1], "round 1: phone: no reply"),
        (RECORDS, "round 2: nobody there"),
    ],
)
def test_a_run_in_which_nothing_was_trained_is_none(records, why):
    said = rf"Nothing was trained, .* \({why}\); the warnings"
    with pytest.raises(UserError, match=said):
        require_training(records)
    trained = replace(BLOCK, status="accepted")
    require_training([replace(RECORDS[0], blocks=(BLOCK, trained)), *records])
    require_training([StepRecord(1, 3, 3.0, exchanges=7), *records])


def test_what_is_written_is_read(path):
    first, second = read_rounds(path)
    assert first == RECORDS[0]
    assert math.isnan(second.bound_s)
    assert second.to_json() == RECORDS[1].to_json()


def test_a_line_that_is_still_being_written_is_left_out(path):
    with path.open("a") as file:
        file.write('{"server_round": 3')
    assert len(read_rounds(path)) == 2


def test_what_a_later_version_adds_is_left_out(path):
    path.write_text(path.read_text().replace('{"server', '{"new": 1, "server'))
    assert read_rounds(path)[0] == RECORDS[0]


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"blocks": [3]}'])
def test_a_line_that_is_no_record(path, line):
    with path.open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(UserError, match=r"line 3 is no record"):
        read_rounds(path)


def test_no_file(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_rounds(tmp_path / "rounds.jsonl")


def test_a_search_that_ended_at_its_time_limit_is_said():
    assert not any("time limit" in line for line in RECORDS[0].lines())
    limited = replace(RECORDS[0], worth_gap=0.0123)
    (line,) = (line for line in limited.lines() if "time limit" in line)
    assert "others may be worth up to 1.23% more" in line
    assert json.loads(limited.to_json())["worth_gap"] == 0.0123
    assert json.loads(RECORDS[0].to_json())["worth_gap"] is None
