"""The GLUE app through a real SuperLink, Ray and all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lola_flwr.blocks import partition_parameters
from lola_flwr.models import load_classifier
from simulations.run import run_app

APP = Path(__file__).parent.parent / "simulations" / "glue"
TINY = ('model="random:roberta-tiny"', "batch-size=8", "rounds=3", "eval-every=2")


def run(tmp_path, *overrides, num_devices=5):
    return run_app(
        APP,
        num_devices=num_devices,
        # Without their number the first round could start before all have registered.
        run_config=[
            *(*TINY, f"num-devices={num_devices}"),
            *(f'output-dir="{tmp_path}/out"', *overrides),
        ],
        home=tmp_path / "home",
    )


def rounds_of(tmp_path):
    lines = (tmp_path / "out" / "rounds.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def without_measurements(record):
    record = {k: v for k, v in record.items() if not k.startswith("measured")}
    record["blocks"] = [
        {k: v for k, v in block.items() if not k.startswith("measured")}
        for block in record["blocks"]
    ]
    return record


def test_a_run_completes_and_one_seed_gives_one_result(tmp_path):
    first = run(tmp_path / "a")
    again = run(tmp_path / "b")

    assert first.completed, first.output
    records = rounds_of(tmp_path / "a")
    assert [record["server_round"] for record in records] == [1, 2, 3]
    for record in records:
        assert [block["block_index"] for block in record["blocks"]] == [0, 1, 2, 3]
        assert {block["status"] for block in record["blocks"]} == {"accepted"}
        assert record["num_devices"] == 5
        assert record["refused"] == {}
    assert records[-1]["wireless_s"] == pytest.approx(
        sum(r["round_s"] for r in records)
    )
    # Evaluated every second round, and after the last.
    assert [bool(record["metrics"]) for record in records] == [False, True, True]
    accuracy = records[-1]["metrics"]["accuracy"]
    wireless_s = records[-1]["wireless_s"]
    assert first.final is not None
    assert first.final.startswith(
        f"final: accuracy={accuracy:.4f} rounds=3 wireless_s={wireless_s:.3f}"
    )
    assert "block  0 depth  4" in first.output

    assert again.completed, again.output
    assert [without_measurements(r) for r in rounds_of(tmp_path / "b")] == [
        without_measurements(r) for r in records
    ]


def test_both_interfaces_give_the_same_metrics_and_models(tmp_path):
    records, models = {}, {}
    for interface in ("legacy", "message"):
        directory = tmp_path / interface
        finished = run(
            directory,
            f'interface="{interface}"',
            "rounds=2",
            "save-model=true",
            'optimizer="Adam"',
            'optimizer-options="betas=[0.9, 0.99], eps=1e-3"',
            'schedule="CosineAnnealingLR"',
            'schedule-options="T_max=4"',
            num_devices=4,
        )
        assert finished.completed, finished.output
        records[interface] = rounds_of(directory)
        saved = directory / "out" / "model"
        models[interface], _ = load_classifier(str(saved), num_labels=2)
    assert [bool(record["metrics"]) for record in records["message"]] == [False, True]
    assert [without_measurements(r) for r in records["message"]] == [
        without_measurements(r) for r in records["legacy"]
    ]
    initial, _ = load_classifier("random:roberta-tiny", num_labels=2)
    blocks = partition_parameters(name for name, _ in initial.named_parameters())
    for name, values in models["message"].named_parameters():
        assert torch.equal(values, models["legacy"].get_parameter(name))
        changed = not torch.equal(values, initial.get_parameter(name))
        assert changed == (name in blocks.trainable), name


def test_a_users_mistake_ends_the_run_with_one_line(tmp_path):
    finished = run(tmp_path, num_devices=3)
    assert finished.status == "finished:failed"
    assert finished.error is not None
    assert "Too few devices: 3 for 4 blocks" in finished.error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (['task="cole"'], "cola"),
        (['task="cola"'], "data-dir"),
        (['task="cola"', 'data-dir="/nowhere"'], "/nowhere"),
        (["batch-size=50000"], "required_memory_bytes"),
        (['model="no/such-model"'], "minilm-l6"),
        (['allocator="greedi"'], "Did you mean 'greedy'"),
        (['schedule="Cosine"'], "is not a schedule"),
        (['optimizer-options="eps"'], "optimizer-options='eps'"),
        (["rounds=0", 'codec="zip"'], "rounds=0: Input should be greater"),
    ],
)
def test_more_mistakes(tmp_path, overrides, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    finished = run(tmp_path, *overrides)
    assert finished.status == "finished:failed"
    assert finished.error is not None
    assert message in finished.error
