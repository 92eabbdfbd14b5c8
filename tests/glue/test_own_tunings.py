"""Tunings of our own through the whole app, in this machine's processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers

from lola_flwr.model.loading import load_classifier
from tests.tree import ROOT

APP = ROOT / "simulations" / "glue"
TINY = ("model=random:roberta-tiny", "batch-size=8", "eval-every=2")
TUNINGS = {"paca": "r=4", "svfit": "k=16", "lamda": "r=4", "peqa": "bits=8"}


def run_app(directory, *overrides):
    """Run the app; return the directory of its results."""
    directory.mkdir(exist_ok=True)
    ran = subprocess.run(
        [
            *(sys.executable, "-m", "lola_flwr.cli.main", "simulate", str(APP)),
            *("--plain", "--devices", "5", "--home", str(directory / "home")),
            *("--cpus-per-client", str(os.cpu_count() or 1)),
            *(*TINY, "num-devices=5", f"output-dir={directory}/out", *overrides),
        ],
        cwd=directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout
    return directory / "out"


def run(directory, tuning, *overrides):
    """Run the app; return its records and the saved model's bytes."""
    tuned = (f"tuning={tuning}", f"tuning-options={TUNINGS[tuning]}")
    run_app(directory, "save-model=true", *tuned, *overrides)
    lines = (directory / "out" / "rounds.jsonl").read_text().splitlines()
    records = [
        {k: v for k, v in json.loads(line).items() if not k.startswith("measured")}
        for line in lines
    ]
    return records, (directory / "out" / "model" / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("tuning", TUNINGS)
def test_a_run_goes_on_under_the_other_interface_to_the_same_bits(tuning, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    records, saved = run(whole, tuning, "rounds=4", "interface=message")
    for record in records:
        assert {block["status"] for block in record["blocks"]} == {"accepted"}
        assert len(record["blocks"]) == 4
    run(parts, tuning, "rounds=2", "interface=message")
    assert run(parts, tuning, "rounds=4", "interface=legacy") == (records, saved)
    # A plain model, whose layers alone have changed, and the head.
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(
        whole / "out" / "model"
    )
    initial, _ = load_classifier("random:roberta-tiny", num_labels=2)
    for name, values in loaded.named_parameters():
        changed = not torch.equal(values, initial.get_parameter(name))
        in_layer = ".layer." in name and name.endswith(("dense.weight", "y.weight"))
        assert changed == (in_layer or "value.w" in name or "classifier" in name), name


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("tuning", "options", "lr", "rounds"),
    [
        ("paca", "r=8", "1e-2", 24),
        ("svfit", "", "2e-2", 40),
        ("peqa", "", "2e-2", 40),
    ],
)
def test_the_embedded_task_is_learned(tuning, options, lr, rounds, tmp_path):
    records, _ = run(
        tmp_path,
        tuning,
        *("model=minilm-l6", "batch-size=32", f"eval-every={rounds}"),
        *(f"tuning-options={options}", f"lr={lr}", f"rounds={rounds}"),
    )
    start, last = records[0]["start_metrics"], records[-1]["metrics"]
    assert last["loss"] < 0.95 * start["loss"]
    assert last["accuracy"] > 0.55 > start["accuracy"]
