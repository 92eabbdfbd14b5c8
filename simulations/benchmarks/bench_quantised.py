"""Memory of all processes that fine-tune adapters on a decoder in 4 bits.

Run with ``pytest simulations/benchmarks/bench_quantised.py -s``. The model has the
shape of Qwen2.5-0.5B (24 layers, 151,936 words, tied embeddings) and random weights;
rows are 32 tokens long, a mini-batch is one. Memory is the peak of the proportional set
sizes of all processes of a run, start-up included, in which the base is drawn in
float32 and then quantised.
"""

from __future__ import annotations

import json
import os

import pytest
import transformers

from lola_causal.embedded import embedded_tokenizer
from lola_flwr.simulation import run_app
from simulations.benchmarks.bench_against_fedavg import PeakMemory
from tests.test_causal_app import APP

# Devices: what all processes may take.
MOST_GIB = {6: 8.0, 24: 12.0}
ROUNDS = 2


def qwen(directory):
    """Write the configuration, and a small tokenizer whose words it has."""
    transformers.Qwen2Config(
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        architectures=["Qwen2ForCausalLM"],
    ).save_pretrained(directory)
    embedded_tokenizer().save_pretrained(directory)
    return directory


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("num_devices", MOST_GIB)
def test_a_decoder_in_4_bits(num_devices, tmp_path, capsys):
    lines = [{"prompt": "what does the cow say ?", "completion": " moo ."}] * 60
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))
    options = {
        "model": f"random:{qwen(tmp_path / 'qwen')}",
        "data": str(data),
        "tuning": "lora",
        "tuning-options": "r=8, target_modules=['q_proj', 'v_proj']",
        "base": "nf4",
        "output-dir": str(tmp_path / "out"),
    }
    with PeakMemory() as memory:
        finished = run_app(
            APP,
            num_devices=num_devices,
            run_config=[
                *(f'{key}="{value}"' for key, value in options.items()),
                *(f"num-devices={num_devices}", f"rounds={ROUNDS}", "eval-every=2"),
                *("batch-size=1", "max-length=32"),
            ],
            home=tmp_path / "home",
            # One process that trains.
            cpus_per_client=os.cpu_count() or 1,
        )
    assert finished.completed, finished.output
    records = (tmp_path / "out" / "rounds.jsonl").read_text().splitlines()
    assert len(records) == ROUNDS
    blocks = [b for line in records for b in json.loads(line)["blocks"]]
    assert {block["status"] for block in blocks} == {"accepted"}
    peak_gib = memory.peak_bytes / 2**30
    with capsys.disabled():
        print(
            f"\n{num_devices} devices, {len(blocks)} updates in {ROUNDS} rounds: "
            f"{peak_gib:.1f} GiB at the peak"
        )
    assert peak_gib <= MOST_GIB[num_devices]
