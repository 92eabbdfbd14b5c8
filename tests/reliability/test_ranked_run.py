"""Whole runs in which devices send some components of LoRA adapters."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from lola_flwr.device.store import run_store
from lola_flwr.model.adapters import adapt
from lola_flwr.wire.held_versions import HeldVersions
from tests.reliability import tiny_run
from tests.reliability.test_resume import assert_same_end, records

RANK = 4


def adapted():
    """The tiny model with adapters in which the components are not alike."""
    return adapt(
        tiny_run.tiny_model(),
        "lora",
        {"r": RANK, "target_modules": ["query", "value"], "init_lora_weights": "pissa"},
    )


def run(directory, **arguments):
    """Run with devices that keep what they hold, and what their codec leaves out."""
    return tiny_run.run(
        directory,
        options={
            "rank": 2,
            "codec": "int8",
            "downlink": "changed",
        },
        make_model=adapted,
        store=run_store(1, directory / "devices"),
        **arguments,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"), [("legacy", "message"), ("message", "legacy")]
)
def test_a_run_goes_on_where_it_stopped(tmp_path, before, after):
    unbroken = run(tmp_path / "unbroken", num_rounds=4)
    run(tmp_path / "stopped", num_rounds=2, interface=before)
    again = run(tmp_path / "stopped", num_rounds=4, interface=after, first_node=9000)
    kept = records(tmp_path / "unbroken")
    assert all(not record["refused"] for record in kept)
    assert {block["rank"] for record in kept for block in record["blocks"]} == {2}
    squares = unbroken.snapshot().values["state"]["components"]["squares"]
    assert json.loads(json.dumps(squares)) == squares
    assert len(squares) == 3
    for coordinator in (again, unbroken):
        # Another start is told anew what devices hold.
        coordinator.state = replace(coordinator.state, held=HeldVersions())
    assert_same_end(again, unbroken)
