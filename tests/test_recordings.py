"""The same seed gives the records that were kept of it: see tests/recordings.

To record anew: ``python -m tests.recordings [NAME ...]``, and say in the commit which
behaviour changed. A field that later records have in addition is named in ``ADDED``.
"""

from __future__ import annotations

import math
import shutil

import pytest

from lola_flwr.errors import UserError
from tests.recordings import runs as recordings
from tests.recordings.runs import FAST, SLOW

# Fields of a round, and of a device's part in it, that the recordings do not have yet,
# and those that later records of a configuration lack: they said nothing.
ADDED = frozenset(
    {
        "start_metrics",
        "further_blocks",
        "unexplained_s",
        "worth_gap",
        "downlink_s",
        "turn_s",
        "measured_downlink_s",
        "server_s",
        "noise_scale",
        "batch_size",
        "joules",
        "measured_compute_j",
        "rank",
    }
)
DROPPED: dict[str, frozenset[str]] = {}

# Another machine may sum in another order: losses and metrics follow from sums over
# thousands of float32 values, all else from few float64 values, or is discrete.
_LEARNED = ("loss", "train_loss", "metrics")
_LEARNED_TOLERANCE, _PLANNED_TOLERANCE = 1e-5, 1e-9


def differences(then, now, dropped=frozenset(), where="", tolerance=_PLANNED_TOLERANCE):
    """Say, line by line, where two records (or values in them) differ."""
    if isinstance(then, dict) and isinstance(now, dict):
        lines = [f"{where}{key} is new" for key in now.keys() - then.keys() - ADDED]
        for key, value in then.items():
            if key in now:
                told = _LEARNED_TOLERANCE if key in _LEARNED else tolerance
                place = f"{where}{key}."
                lines += differences(value, now[key], dropped, place, told)
            elif key not in dropped or value:
                lines.append(f"{where}{key} is missing, was {value!r}")
        return lines
    if isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        return [
            line
            for n, (one, other) in enumerate(zip(then, now, strict=True))
            for line in differences(one, other, dropped, f"{where}{n}.", tolerance)
        ]
    if isinstance(then, float) and isinstance(now, float):
        same = math.isclose(then, now, rel_tol=tolerance)
    else:
        same = (type(then), then) == (type(now), now)
    return [] if same else [f"{where[:-1]} is {now!r}, was {then!r}"]


def check(name, records):
    then = recordings.recorded(name)
    assert len(records) == len(then)
    now = [
        {k: v for k, v in record.items() if k not in recordings.MACHINE_TIMES}
        for record in records
    ]
    assert differences(then, now, DROPPED.get(name, frozenset())) == []


def learned(records):
    return [(record["train_loss"], record["metrics"]) for record in records]


def check_but_for_bits(name, records, tmp_path):
    """Check a run whose choices hang on sums of float32 values, to their last bit.

    Where it differs on a machine that sums in another order than the one that recorded,
    nothing can be said.
    """
    try:
        check(name, records)
    except AssertionError:
        again = recordings.replay("message", tmp_path / "message")
        if learned(again) == learned(recordings.recorded("message")):
            raise
        pytest.skip("what was recorded hangs on bits that this machine has otherwise")


@pytest.mark.parametrize("name", FAST)
def test_a_run_is_as_it_was(name, tmp_path):
    check(name, recordings.replay(name, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_a_longer_run_is_as_it_was(name, tmp_path):
    told, records = SLOW[name], recordings.replay(name, tmp_path)
    if "sampler" in told or "auto" in told.values():
        check_but_for_bits(name, records, tmp_path)
    else:
        check(name, records)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_demo_is_as_it_was(tmp_path):
    check_but_for_bits("demo", recordings.replay_demo(tmp_path), tmp_path)


def test_a_run_that_an_earlier_version_began_goes_on_or_is_refused(tmp_path):
    shutil.copytree(recordings.STOPPED, tmp_path / "out")
    try:
        records = recordings.replay("resumed", tmp_path)
    except UserError as refusal:
        # As on a machine that draws other random weights, in the last bit.
        assert len(str(refusal).splitlines()) == 1
    else:
        check("resumed", records)


def test_both_interfaces_were_recorded_as_one():
    assert recordings.recorded("legacy") == recordings.recorded("message")


@pytest.mark.parametrize("name", [*FAST, *SLOW, "demo"])
def test_what_was_recorded_took_place(name):
    records = recordings.recorded(name)
    assert [r["server_round"] for r in records] == [*range(1, len(records) + 1)]
    assert not any(r["skipped"] or r["refused"] for r in records)
    assert {b["status"] for r in records for b in r["blocks"]} <= {"accepted"}
    assert records[-1]["metrics"]["loss"] > 0


def test_what_differs_is_said():
    (then, *_) = recordings.recorded("message")
    assert differences(then, then) == []
    part = then["blocks"][1]

    def told(**changes):
        blocks = [then["blocks"][0], {**part, **changes}, *then["blocks"][2:]]
        return differences(then, {**then, "blocks": blocks})

    assert told(share=part["share"] * (1 + 1e-10)) == []
    assert told(share=part["share"] * (1 + 1e-8))[0].startswith("blocks.1.share is")
    assert told(loss=part["loss"] * (1 + 1e-6)) == []
    assert len(told(loss=part["loss"] * (1 + 1e-4))) == 1
    assert len(told(payload_bytes=part["payload_bytes"] + 1)) == 1
    assert len(told(device="another", status="no reply")) == 2
    assert told(answers=1) == ["blocks.1.answers is new"]
    assert len(differences(then, {**then, "blocks": then["blocks"][1:]})) == 1
    spread, *_ = recordings.recorded("d2ft")
    without = {k: v for k, v in spread.items() if k not in ("blocks", "round_s")}
    lines = differences(spread, without, {"blocks", "round_s"})
    assert [line.split(",")[0] for line in lines] == ["round_s is missing"]
