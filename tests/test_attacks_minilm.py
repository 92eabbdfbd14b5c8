"""The attack bench's larger task: MiniLM on the embedded sentences."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from lola_flwr.costs.estimated import estimate_costs
from lola_flwr.model.adapter_blocks import model_partition
from lola_flwr.model.loading import load_classifier
from lola_glue.tasks import load_task
from simulations.attacks import embedded, federation
from simulations.attacks.__main__ import ATTACKS
from simulations.attacks.data import DATA_ATTACKS
from simulations.attacks.embedded import MINILM, TRIGGER, EmbeddedTask
from simulations.attacks.federation import run
from simulations.attacks.scenario import MODELS, Scenario
from simulations.attacks.task import TARGET

DEVICES = 12


@pytest.fixture(scope="module")
def tiny():
    """A model with random weights, which tokenizes as MiniLM does."""
    return load_classifier("random:roberta-tiny", num_labels=2)


@pytest.fixture
def task(tiny, monkeypatch):
    monkeypatch.setattr(embedded, "_loaded", lambda seed: tiny)
    return EmbeddedTask.split(DEVICES, alpha=None, seed=3)


def words(task, batch):
    return [
        task.tokenizer.decode(ids[mask.bool()])
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


def test_each_example_is_on_one_device_and_drawn_the_same_again(task):
    assert len(task.parts) == DEVICES
    everything = np.concatenate(task.parts)
    assert sorted(everything) == [*range(len(task.train.labels))]
    first, again = task.draw(2, 5, 16), task.draw(2, 5, 16)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["labels"], task.draw(2, 6, 16)["labels"])
    mine = {task.train.sentences[row][0].lower() for row in task.parts[2]}
    assert {w[6:-6] for w in words(task, first)} <= mine
    few = replace(task, parts=[rows[:3] for rows in task.parts])
    assert len(few.draw(2, 5, 16)["labels"]) == 3, "no example twice"


def test_the_servers_own_examples_are_of_both_classes(task):
    own = task.own_examples(64)
    assert len(own["labels"]) == 64
    assert set(own["labels"].tolist()) == {0, 1}


def test_the_trigger_is_a_word_that_no_sentence_has(task):
    assert task.tokenizer.tokenize(TRIGGER) == [TRIGGER]
    _, train, held_out = load_task("acceptability", seed=3)
    texts = [text for text, _ in (*train.sentences, *held_out.sentences)]
    assert not any(TRIGGER in task.tokenizer.tokenize(text) for text in texts)


def test_a_trigger_is_put_before_the_separator_of_the_first_ones(task):
    batch = task.draw(0, 1, 16)
    lengths = batch["attention_mask"].sum(dim=1)
    assert lengths.min() < lengths.max(), "some are padded"
    changed = task.with_trigger(batch, 10)
    before, after = words(task, batch), words(task, changed)
    for text, new in zip(before[:10], after[:10], strict=True):
        assert new == text.replace(" [SEP]", f" {TRIGGER} [SEP]").replace(
            ".[SEP]", f". {TRIGGER}[SEP]"
        )
    assert after[10:] == before[10:]
    assert {name: tensor.dtype for name, tensor in changed.items()} == {
        name: tensor.dtype for name, tensor in batch.items()
    }
    # What the tokenizer itself makes of such sentences.
    rows = changed["input_ids"].shape[1]
    for ids, new in zip(changed["input_ids"], after, strict=True):
        expected = task.tokenizer(new[5:-5])["input_ids"]
        padding = [task.tokenizer.pad_token_id] * (rows - len(expected))
        assert ids.tolist() == expected + padding


def test_data_attacks_change_labels_and_triggers(task):
    flip, backdoor = DATA_ATTACKS
    batch = task.draw(0, 1, 16)
    flipped = flip.batch(batch, task)
    assert torch.equal(flipped["labels"], 1 - batch["labels"])
    taught = backdoor.batch(batch, task)
    assert set(taught["labels"][:8].tolist()) == {TARGET}
    assert torch.equal(taught["labels"][8:], batch["labels"][8:])
    assert [TRIGGER in text for text in words(task, taught)] == [True] * 8 + [False] * 8


class Says(torch.nn.Module):
    """Is of class 1 where a sentence has a token, and of class 0 elsewhere."""

    def __init__(self, token):
        super().__init__()
        self.token = token

    def forward(self, input_ids, **_):
        has = (input_ids == self.token).any(dim=1).long()

        class Output:
            logits = torch.nn.functional.one_hot(has, 2).float()

        return Output


def test_what_a_backdoor_turned_is_counted_among_what_was_right(task):
    trigger = task.tokenizer.convert_tokens_to_ids(TRIGGER)
    share_of_zeros = float((task.held_out.labels == 0).mean())
    for token, accuracy, turned in (
        (trigger, share_of_zeros, 1.0),
        (task.tokenizer.unk_token_id, share_of_zeros, 0.0),
        (task.tokenizer.sep_token_id, 1 - share_of_zeros, math.nan),
    ):
        assert task.accuracy(Says(token)) == pytest.approx(accuracy)
        found = task.backdoor_success(Says(token))
        assert found == pytest.approx(turned, nan_ok=True)


def test_a_run_on_sentences(tiny, monkeypatch):
    """With a tiny model: blocks, own examples and an attack go through the server."""
    monkeypatch.setattr(embedded, "_loaded", lambda seed: tiny)
    model, partition = tiny[0], model_partition(tiny[0])
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    # What a device has to count takes seconds.
    costs = estimate_costs(shapes, partition, batch_size=4, sequence_length=64)
    monkeypatch.setattr(federation, "_costs", lambda *_: costs)
    small = replace(MINILM, load=lambda seed: (model, partition))
    monkeypatch.setitem(MODELS["lola"], "minilm", small)
    scenario = Scenario(
        share=0.25,
        num_devices=4,
        rounds=1,
        batch_size=4,
        own_examples=4,
        model="minilm",
    )
    came = run(scenario, ATTACKS["backdoor"])
    assert 0.3 < came.accuracy < 0.7
    assert came.honest_refused == 0


@pytest.mark.slow
def test_a_dirichlet_split_is_uneven():
    task = EmbeddedTask.split(DEVICES, alpha=0.3, seed=0)
    ones = [float(task.train.labels[rows].mean()) for rows in task.parts]
    assert sorted(np.concatenate(task.parts)) == [*range(len(task.train.labels))]
    assert min(ones) < 0.2 < 0.8 < max(ones)


@pytest.mark.slow
def test_minilm_learns_the_sentences_and_what_hostile_devices_teach():
    recipe = MINILM.recipe
    scenario = Scenario(
        model="minilm", rounds=12, batch_size=recipe.batch_size, lr=recipe.lr, share=0.3
    )
    honest = run(replace(scenario, share=0.0), ATTACKS["none"])
    attacked = run(scenario, ATTACKS["sign flip, 9.9 times"])
    assert honest.found == 0
    assert attacked.found > 0
    assert json.dumps(asdict(attacked))
