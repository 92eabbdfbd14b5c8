"""Steps that take less memory: by both interfaces, and in a run that was stopped."""

from __future__ import annotations

import pytest

from tests.marks import rest_slow
from tests.recordings.runs import MACHINE_TIMES
from tests.reliability.app_run import run_app

STEPS = {
    "activations": {"activations": "int8"},
    "forward mode": {
        "zeroth_order": "always",
        "zeroth_order_options": "lr=1e-3, num_directions=5, perturbation=0",
    },
}


def run(directory, **options):
    found = run_app(
        directory,
        model="random:roberta-tiny",
        num_devices=4,
        batch_size=4,
        eval_every=1,
        lr=1e-2,
        **options,
    )
    return [
        {key: value for key, value in record.items() if key not in MACHINE_TIMES}
        for record in found
    ]


@pytest.mark.parametrize("name", rest_slow([*STEPS], fast=0))
def test_both_interfaces_and_a_run_that_goes_on_come_to_the_same(
    name, tmp_path, monkeypatch
):
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))
    options = STEPS[name]
    whole = run(tmp_path / "whole", rounds=2, **options)
    assert not any(record["refused"] for record in whole)
    assert run(tmp_path / "legacy", rounds=2, interface="legacy", **options) == whole
    run(tmp_path / "parts", rounds=1, **options)
    assert run(tmp_path / "parts", rounds=2, **options) == whole
