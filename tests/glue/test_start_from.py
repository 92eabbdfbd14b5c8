"""LoRA that goes on from a first stage (SLoRA), through the whole app."""

from __future__ import annotations

import json

import pytest
from safetensors.numpy import load_file

from tests.glue.test_own_tunings import run_app


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_that_began_from_another_goes_on_to_the_same_bits(tmp_path):
    targets = "target_modules=['query', 'value']"
    first = tmp_path / "first"
    run_app(
        first,
        *("tuning=shira", f"tuning-options=r=4, {targets}", "lr=1e-2", "rounds=3"),
        *("save-merged=true", "partitioning=dirichlet", "dirichlet-alpha=0.5"),
    )
    begun = (
        *("tuning=lora", f"tuning-options=r=4, {targets}", "save-model=true"),
        f"start-from={first}/out/merged",
    )

    def second(name, *overrides):
        out = run_app(tmp_path / name, *begun, *overrides)
        saved = load_file(out / "model" / "adapter_model.safetensors")
        lines = (out / "rounds.jsonl").read_text().splitlines()
        records = [
            {k: v for k, v in json.loads(line).items() if not k.startswith("measured")}
            for line in lines
        ]
        return records, {name: values.tobytes() for name, values in saved.items()}

    records, saved = second("whole", "rounds=4", "interface=message")
    for record in records:
        assert {block["status"] for block in record["blocks"]} == {"accepted"}
    second("parts", "rounds=2", "interface=message")
    assert second("parts", "rounds=4", "interface=legacy") == (records, saved)
    # Devices that keep copies are sent where it begins, too.
    kept = second("kept", "rounds=4", "interface=message", "downlink=changed")
    assert kept[1] == saved
    # It begins where the first stage ended, as nearly as its rank allows.
    ended = (first / "out" / "rounds.jsonl").read_text().splitlines()[-1]
    start = records[0]["start_metrics"]["loss"]
    assert start == pytest.approx(json.loads(ended)["metrics"]["loss"], rel=0.02)
