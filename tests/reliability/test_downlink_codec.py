"""Runs whose model comes down as coded changes, under both interfaces."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.reliability.app_run import run_app

TINY = {
    "model": "random:roberta-tiny",
    "num_devices": 5,
    "batch_size": 4,
    "rounds": 4,
    "eval_every": 4,
    "max_length": 8,
    "checkpoint_every": 2,
    "keep_checkpoints": 3,
    "downlink": "changed",
    "downlink_codec": "int8",
    "downlink_channel": "broadcast",
}

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))


@pytest.mark.parametrize("interface", ["message", "legacy"])
def test_devices_that_are_up_to_date_are_sent_changes(tmp_path, interface):
    records = run_app(tmp_path / "out", **TINY, interface=interface)
    whole = records[0]["blocks"][0]["sent_bytes"]
    assert {b["sent_bytes"] for b in records[0]["blocks"]} == {whole}
    later = [b["sent_bytes"] for record in records[1:] for b in record["blocks"]]
    # What is whole comes in bfloat16, two bytes a value, and a change in one.
    assert min(later) < 0.6 * whole and {min(later), whole} >= {*later}
    assert not any(record["refused"] for record in records)
    total_s = 0.0
    for record in records:
        total_s += max(
            b["downlink_s"] + b["reported_compute_s"] + b["upload_s"]
            for b in record["blocks"]
        )
        assert record["wireless_s"] == pytest.approx(total_s)


def test_a_run_that_was_stopped_ends_with_the_same_values(tmp_path):
    options = {**TINY, "downlink_channel": "free"}
    run_app(tmp_path / "whole", **options)
    run_app(tmp_path / "parts", **{**options, "rounds": 2})
    run_app(tmp_path / "parts", **options)
    one, other = (
        load_file(tmp_path / name / "checkpoints" / "round-000004.safetensors")
        for name in ("whole", "parts")
    )
    assert any(name.startswith("sent/") for name in one)
    assert one.keys() == other.keys()
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name])
