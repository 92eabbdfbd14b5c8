"""The causal app through a real SuperLink, Ray and all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import peft
import pytest
import torch

from lola_causal.embedded import embedded_tokenizer
from lola_causal.model import made
from lola_flwr.model.adapters import adapt
from lola_flwr.model.stored_base import store_base
from lola_flwr.simulation import run_app

pytestmark = [pytest.mark.flower_run, pytest.mark.slow]

APP = Path(__file__).parent.parent / "simulations" / "causal"
OPTIONS = ("num-devices=4", "rounds=3", "eval-every=2", "batch-size=8", "seed=1")


def run(directory, *overrides):
    finished = run_app(
        APP,
        num_devices=4,
        run_config=[*OPTIONS, f'output-dir="{directory}/out"', *overrides],
        home=directory / "home",
        cpus_per_client=os.cpu_count() or 1,
    )
    assert finished.completed, finished.output
    lines = (directory / "out" / "rounds.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("interface", ["legacy", "message"])
def test_adapters_on_a_quantised_base_are_trained_saved_and_write(interface, tmp_path):
    records = run(
        tmp_path,
        *(f'interface="{interface}"', 'tuning="lora"', 'base="nf4"', "packing=true"),
        *("lr=1e-2", 'codec="bf16"', "save-model=true", "save-merged=true"),
    )
    assert [record["server_round"] for record in records] == [1, 2, 3]
    for record in records:
        assert {block["status"] for block in record["blocks"]} == {"accepted"}
        assert len(record["blocks"]) == 4
        assert record["refused"] == {}
    start, last = records[0]["start_metrics"], records[-1]["metrics"]
    assert last.keys() == {"loss", "perplexity", "exact_match"}
    assert last["perplexity"] < start["perplexity"]
    base = made(1)[0].requires_grad_(False)
    store_base(base, "nf4", [name for name, _ in base.named_parameters()])
    model = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "model").eval()
    tokenizer = embedded_tokenizer().from_pretrained(tmp_path / "out" / "model")
    asked = tokenizer("what does the cow say ?", return_tensors="pt")
    asked.pop("token_type_ids", None)
    written = model.generate(**asked, max_new_tokens=3, do_sample=False)
    assert written.shape[1] > asked["input_ids"].shape[1]
    merged = type(base).from_pretrained(tmp_path / "out" / "merged")
    with torch.no_grad():
        torch.testing.assert_close(
            merged(**asked).logits, model(**asked).logits, rtol=1e-4, atol=1e-4
        )
    untrained = adapt(made(1)[0], "lora", base="nf4", seed=1)
    assert not torch.equal(untrained(**asked).logits, model(**asked).logits)


def test_adapters_of_a_pruned_decoder_are_saved_for_the_whole_one(tmp_path):
    records = run(
        tmp_path,
        *('interface="message"', 'tuning="lora"', 'pruning="heads=0.5, neurons=0.25"'),
        *("lr=1e-2", "save-model=true", "save-merged=true"),
    )
    for record in records:
        assert {block["status"] for block in record["blocks"]} == {"accepted"}
        assert len(record["blocks"]) == 4
    start, last = records[0]["start_metrics"], records[-1]["metrics"]
    assert last["perplexity"] < start["perplexity"]
    model = peft.PeftModel.from_pretrained(made(1)[0], tmp_path / "out" / "model")
    merged = type(made(1)[0]).from_pretrained(tmp_path / "out" / "merged")
    asked = embedded_tokenizer()("what does the cow say ?", return_tensors="pt")
    asked.pop("token_type_ids", None)
    with torch.no_grad():
        found, expected = merged(**asked).logits, model(**asked).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(made(1)[0](**asked).logits, expected)


def test_d2ft_spreads_a_decoder_and_goes_on(tmp_path):
    options = (
        *('method="d2ft"', 'd2ft-options="micro_batches=2"', "num-devices=2"),
        *('tuning="lora"', "lr=1e-2", 'schedule="constant"'),
    )
    run(tmp_path, *options, "rounds=2")
    records = run(tmp_path, *options, "rounds=4")
    assert [record["server_round"] for record in records] == [1, 2, 3, 4]
    assert not any(record["skipped"] for record in records)
    start, last = records[0]["start_metrics"], records[-1]["metrics"]
    assert last["perplexity"] < start["perplexity"]
