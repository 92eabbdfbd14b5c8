"""The GLUE app through a real SuperLink, Ray and all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers

from lola_flwr.model.blocks import partition_parameters
from lola_flwr.model.loading import load_classifier
from lola_flwr.model.saved_ladder import load_ladder
from lola_flwr.simulation import run_app
from lola_glue.tasks import TASKS
from tests.marks import rest_slow

pytestmark = pytest.mark.flower_run

APP = Path(__file__).parent.parent / "simulations" / "glue"
OPTIONS = (
    "save-model=true",
    'optimizer="Adam"',
    'optimizer-options="betas=[0.9, 0.99], eps=1e-3"',
    'schedule="CosineAnnealingLR"',
    'schedule-options="T_max=4"',
)
QUERIES = [f"roberta.encoder.layer.{i}.attention.self.query" for i in range(4)]
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
        # One process that imports PyTorch is enough.
        cpus_per_client=os.cpu_count() or 1,
    )


def rounds_of(tmp_path):
    lines = (tmp_path / "out" / "rounds.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def without_measurements(records):
    return [
        {k: v for k, v in record.items() if not k.startswith("measured")}
        for record in records
    ]


def saved(directory):
    names = TASKS["acceptability"].class_names
    return load_classifier(str(directory), num_labels=len(names), class_names=names)


def saved_model(directory):
    return saved(directory / "out" / "model")[0]


@pytest.fixture(scope="module")
def legacy(tmp_path_factory):
    """Return a finished run under the legacy interface, and its directory."""
    directory = tmp_path_factory.mktemp("legacy")
    return run(directory, *OPTIONS), directory


def test_a_run_completes(legacy):
    finished, directory = legacy
    assert finished.completed, finished.output
    records = rounds_of(directory)
    assert [record["server_round"] for record in records] == [1, 2, 3]
    for record in records:
        assert [block["block_index"] for block in record["blocks"]] == [0, 1, 2, 3]
        assert {block["status"] for block in record["blocks"]} == {"accepted"}
        assert record["num_devices"] == 5
        assert record["refused"] == {}
    assert records[-1]["wireless_s"] == pytest.approx(
        sum(r["observed_s"] for r in records)
    )
    # Evaluated every second round, and after the last.
    assert [bool(record["metrics"]) for record in records] == [False, True, True]
    accuracy = records[-1]["metrics"]["accuracy"]
    wireless_s = records[-1]["wireless_s"]
    assert finished.final is not None
    assert finished.final.startswith(
        f"final: accuracy={accuracy:.4f} rounds=3 wireless_s={wireless_s:.3f}"
    )
    assert "block  0 depth  4" in finished.output
    trained, (initial, _) = (
        saved_model(directory),
        load_classifier("random:roberta-tiny", num_labels=2),
    )
    blocks = partition_parameters(name for name, _ in initial.named_parameters())
    for name, values in trained.named_parameters():
        changed = not torch.equal(values, initial.get_parameter(name))
        assert changed == (name in blocks.trainable), name


CPUS = os.cpu_count() or 1


@pytest.mark.parametrize("cpus_per_client", rest_slow([CPUS, 1]))
def test_processes_leave_the_same_records_and_the_same_model(
    legacy, tmp_path, cpus_per_client
):
    """One process, and one for each core."""
    _, directory = legacy
    words = [*TINY, *OPTIONS, "num-devices=5", f"output-dir={tmp_path}/out"]
    command = [sys.executable, "-m", "lola_flwr.cli.main", "simulate", str(APP)]
    command += ["--devices", "5", "--home", str(tmp_path / "home")]
    command += ["--cpus-per-client", str(cpus_per_client)]
    # Devices have as many threads as where they were alone.
    threads = os.environ.get("OMP_NUM_THREADS", str(CPUS))
    ran = subprocess.run(
        [*command, *words],
        check=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": threads},
        stdout=subprocess.PIPE,
        text=True,
    )
    places = min(5, len(os.sched_getaffinity(0)) // cpus_per_client)
    count = f"{places} processes" if places > 1 else "one process"
    assert f"5 devices in {count} (--engine process)" in ran.stdout
    assert without_measurements(rounds_of(tmp_path)) == without_measurements(
        rounds_of(directory)
    )
    saved = [
        (place / "out" / "model" / "model.safetensors").read_bytes()
        for place in (tmp_path, directory)
    ]
    assert saved[0] == saved[1]


def test_the_saved_model_says_the_tasks_classes(legacy):
    directory = str(legacy[1] / "out" / "model")
    pipe = transformers.pipeline("text-classification", model=directory)
    names = TASKS["acceptability"].class_names
    assert pipe.model.config.id2label == dict(enumerate(names))
    assert pipe.model.config.problem_type == "single_label_classification"
    assert pipe.tokenizer.model_max_length == 64
    # The tokenizer is BERT's, which would number a pair's sentences, the model RoBERTa.
    (said,) = pipe([{"text": "he sings", "text_pair": "sings he"}])
    assert said["label"] in names
    (cut,) = pipe(["word " * 500], truncation=True)
    assert cut["label"] in names


# In the fast suite the recordings replay both interfaces, and a project switched to
# LoLa-DEFT runs through Flower by the Message API.
@pytest.mark.slow
@pytest.mark.parametrize("interface", ["legacy", "message"])
def test_one_seed_gives_one_result_under_both_interfaces(legacy, interface, tmp_path):
    finished = run(tmp_path, *OPTIONS, f'interface="{interface}"')
    assert finished.completed, finished.output
    assert without_measurements(rounds_of(tmp_path)) == without_measurements(
        rounds_of(legacy[1])
    )
    first = saved_model(legacy[1])
    for name, values in saved_model(tmp_path).named_parameters():
        assert torch.equal(values, first.get_parameter(name)), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampler",
    [
        ("entropy", "temperature=0.1, pool_factor=3"),
        ("coreset", "weighted=true"),
        ("history", "measure='loss', weighted=true"),
    ],
)
def test_samplers_give_one_result_under_both_interfaces(sampler, tmp_path):
    found = []
    for interface in ("legacy", "message"):
        name, options = sampler
        run(
            tmp_path / interface,
            f'sampler="{name}"',
            f'sampler-options="{options}"',
            f'interface="{interface}"',
        )
        found.append(without_measurements(rounds_of(tmp_path / interface)))
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.parametrize("interface", ["legacy", "message"])
def test_two_devices_train_twelve_blocks(interface, tmp_path):
    torch.manual_seed(0)
    model, tokenizer = load_classifier("random:roberta-tiny", num_labels=2)
    config = transformers.RobertaConfig(
        **{**model.config.to_dict(), "num_hidden_layers": 12}
    )
    deep = transformers.RobertaForSequenceClassification(config)
    deep.save_pretrained(tmp_path / "deep")
    tokenizer.save_pretrained(tmp_path / "deep")
    options = (f'model="{tmp_path}/deep"', f'interface="{interface}"', 'codec="int8"')
    finished = run(tmp_path, *options, "rounds=2", num_devices=2)
    assert finished.completed, finished.output
    # What a run that goes on reads, it can read.
    options = (*options, "rounds=3", "save-model=true")
    finished = run(tmp_path, *options, num_devices=2)
    assert finished.completed, finished.output
    shares = []
    for record in rounds_of(tmp_path):
        parts = record["blocks"]
        trained = [n for p in parts for n in (p["block_index"], *p["further_blocks"])]
        assert (trained, len(parts)) == ([*range(12)], 2)
        assert {part["status"] for part in parts} == {"accepted"}
        shares.append([p["reported_compute_s"] / p["compute_s"] for p in parts])
    # Devices compute what was planned but for padding, of which the first round tells.
    tokens = [64 * share for share in shares[0]]
    assert tokens == pytest.approx([round(number) for number in tokens])
    first, second, third = map(min, shares)
    assert 0 < first < second < third
    assert max(shares[0]) < 1
    assert len(rounds_of(tmp_path)) == 3
    trained = saved_model(tmp_path)
    blocks = partition_parameters(name for name, _ in deep.named_parameters())
    for name, values in trained.named_parameters():
        changed = not torch.equal(values, deep.get_parameter(name))
        assert changed == (name in blocks.trainable), name


@pytest.mark.slow
def test_d2ft_takes_steps_and_goes_on(tmp_path):
    options = (
        *('method="d2ft"', "num-devices=2"),
        'd2ft-options="traffic=0.5, micro_batches=4, audit_share=0"',
    )
    finished = run(tmp_path, *options, "rounds=2", num_devices=2)
    assert finished.completed, finished.output
    finished = run(tmp_path, *options, "rounds=3", "save-model=true", num_devices=2)
    assert finished.completed, finished.output
    records = rounds_of(tmp_path)
    assert [record["server_round"] for record in records] == [1, 2, 3]
    # Inputs, losses, and of 4 layers 2 branches, forward and back.
    assert {record["exchanges"] for record in records} == {2 + 4 * 2 * 2}
    accuracy = records[-1]["metrics"]["accuracy"]
    assert finished.final.startswith(f"final: accuracy={accuracy:.4f} rounds=3 ")
    trained = saved_model(tmp_path)
    initial, _ = load_classifier("random:roberta-tiny", num_labels=2)
    blocks = partition_parameters(name for name, _ in initial.named_parameters())
    for name, values in trained.named_parameters():
        changed = not torch.equal(values, initial.get_parameter(name))
        assert changed == (name in blocks.trainable), name


@pytest.mark.slow
def test_a_users_mistake_ends_the_run_with_one_line(tmp_path):
    finished = run(tmp_path, "devices-per-block=2", "backups=1")
    assert finished.status == "finished:failed"
    assert finished.error is not None
    assert "Too few devices: 5 for 4 blocks that need 8 devices" in finished.error


@pytest.mark.slow
@pytest.mark.parametrize("initialisation", ["true", "'pissa'"])
def test_adapters_are_saved_as_such_and_merged(initialisation, tmp_path):
    options = f"r=4, init_lora_weights={initialisation}"
    finished = run(
        tmp_path,
        *('tuning="lora"', f'tuning-options="{options}"', "lr=1e-2"),
        *('codec="bf16"', "save-model=true", "save-merged=true"),
    )
    assert finished.completed, finished.output
    assert {
        block["status"] for record in rounds_of(tmp_path) for block in record["blocks"]
    } == {"accepted"}
    initial, _ = load_classifier("random:roberta-tiny", num_labels=2)
    merged, tokenizer = saved(tmp_path / "out" / "merged")
    for name, values in merged.named_parameters():
        changed = not torch.equal(values, initial.get_parameter(name))
        assert changed == ("query.w" in name or "value.w" in name or "class" in name)
    adapted = peft.PeftModel.from_pretrained(initial, tmp_path / "out" / "model").eval()
    sentences = tokenizer(["one", "two words"], padding=True, return_tensors="pt")
    with torch.inference_mode():
        torch.testing.assert_close(
            adapted(**sentences).logits, merged(**sentences).logits
        )


@pytest.mark.slow
@pytest.mark.parametrize("interface", ["legacy", "message"])
def test_a_ladder_goes_on_to_the_same_bits(interface, tmp_path):
    options = ('tuning="ladder"', "lr=1e-2", "save-model=true")
    options = (*options, f'interface="{interface}"')
    at_once = run(tmp_path / "once", *options)
    assert at_once.completed, at_once.output
    for rounds in (2, 3):
        finished = run(tmp_path / "twice", *options, f"rounds={rounds}")
        assert finished.completed, finished.output
    directories = [tmp_path / name / "out" / "model" for name in ("once", "twice")]
    first, second = (
        (directory / "ladder.safetensors").read_bytes() for directory in directories
    )
    assert first == second
    records = rounds_of(tmp_path / "twice")
    assert {b["status"] for record in records for b in record["blocks"]} == {"accepted"}
    base, tokenizer = load_classifier("random:roberta-tiny", num_labels=2)
    loaded = load_ladder(base, directories[0])
    assert set(loaded.config.id2label.values()) == {*TASKS["acceptability"].class_names}
    with torch.inference_mode():
        logits = loaded(**tokenizer(["one"], return_tensors="pt")).logits
    assert logits.shape == (1, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (['tuning="ladder"', "save-merged=true"], "cannot be merged into the model"),
        (['tuning="ladder"', 'method="d2ft"'], "or another method than D2FT"),
        (['tuning="frod"', "save-model=true"], "is read back as another model"),
        (
            [
                *('tuning="lily"', "save-merged=true"),
                # Named in full, so that Lily's layers share nothing.
                f'tuning-options="target_modules={QUERIES}"',
            ],
            "'lily' cannot be merged",
        ),
    ],
)
def test_saving_is_tried_before_the_first_round(overrides, message, tmp_path):
    finished = run(tmp_path, *overrides)
    assert finished.status == "finished:failed"
    assert message in finished.error
    assert not (tmp_path / "out" / "rounds.jsonl").exists()


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
        (['partitioning="dirichlet"', "dirichlet-alpha=0.005"], "Try another seed"),
        (['tuning="prompt-tuning"'], "does not adapt layers one by one"),
        (['tuning="lora"', 'tuning-options="rank=8"'], "keyword argument 'rank'"),
    ],
)
def test_more_mistakes(tmp_path, overrides, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    finished = run(tmp_path, *overrides)
    assert finished.status == "finished:failed"
    assert finished.error is not None
    assert message in finished.error
