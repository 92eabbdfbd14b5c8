from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from lola_flwr.device.sampler_options import (
    Coreset,
    Entropy,
    History,
    sampler_named,
)
from lola_flwr.device.sampling import ChosenBatches, coreset, most_uncertain
from lola_flwr.errors import UserError
from lola_flwr.model.adapter_blocks import model_partition
from lola_flwr.model.backprop import block_gradient
from lola_flwr.model.example_losses import EXAMPLE_WEIGHTS


def test_the_least_certain_come_first():
    chance = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.01, 0.99], [0.3, 0.7]])
    assert most_uncertain(chance.log(), 2).tolist() == [1, 3]
    assert most_uncertain(chance.log(), 4).tolist() == [1, 3, 0, 2]


def test_temperature_changes_the_order_as_it_flattens():
    # Sure of one of three classes, or torn between two: flat predictions part them.
    logits = torch.tensor([[3.0, 2.9, -9.0], [2.2, 0.0, 0.0]])
    assert most_uncertain(logits, 1, temperature=1.0).tolist() == [0]
    assert most_uncertain(logits, 1, temperature=9.0).tolist() == [1]


def covering(logits, labels, chosen):
    """Sum of the distances to the nearest chosen example."""
    error = torch.softmax(logits, 1) - torch.nn.functional.one_hot(labels, 3)
    return float(torch.cdist(error, error)[:, list(chosen)].min(dim=1).values.sum())


def test_a_coreset_stands_for_the_rest(rng):
    lost = []
    for _ in range(20):
        logits = torch.tensor(rng.normal(size=(9, 3)) * 3)
        labels = torch.tensor(rng.integers(0, 3, 9))
        chosen, _ = coreset(logits, labels, 3)
        assert len(set(chosen.tolist())) == 3
        sets = [covering(logits, labels, c) for c in combinations(range(9), 3)]
        own = covering(logits, labels, chosen)
        assert own <= np.mean(sets)
        # Facility location by greedy choice reaches 1 - 1/e of the best gain.
        error = torch.softmax(logits, 1) - torch.nn.functional.one_hot(labels, 3)
        worst = 9 * float(torch.cdist(error, error).max())
        assert worst - own >= (1 - 1 / np.e) * (worst - min(sets)) - 1e-9
        lost.append(own / min(sets))
    assert np.mean(lost) < 1.2


def test_duplicates_are_represented_once():
    logits = torch.tensor([[4.0, 0.0]] * 5 + [[0.0, 4.0]])
    chosen, stands_for = coreset(logits, torch.zeros(6, dtype=torch.long), 2)
    assert dict(zip(chosen.tolist(), stands_for.tolist(), strict=True)) == {0: 5, 5: 1}
    # One that stands for nobody else stands for itself.
    _, stands_for = coreset(logits, torch.zeros(6, dtype=torch.long), 4)
    assert sorted(stands_for.tolist()) == [1, 1, 1, 3]


def test_examples_stand_for_those_they_are_nearest_to(rng):
    for count in (1, 4, 12):
        logits = torch.tensor(rng.normal(size=(12, 3)) * 2)
        labels = torch.tensor(rng.integers(0, 3, 12))
        chosen, stands_for = coreset(logits, labels, count)
        error = torch.softmax(logits, 1) - torch.nn.functional.one_hot(labels, 3)
        expected = dict.fromkeys(chosen.tolist(), 0)
        for one in error:
            expected[min(expected, key=lambda c: float((one - error[c]).norm()))] += 1
        assert stands_for.tolist() == list(expected.values())
        assert stands_for.sum() == 12


def test_weights_bring_a_coreset_nearer_to_its_pool():
    """Of clusters of unequal size, the plain mean over one of each is far off."""
    logits = torch.tensor([[3.0, 0.0]] * 9 + [[0.0, 3.0]] * 2 + [[1.0, 1.0]])
    labels = torch.zeros(12, dtype=torch.long)
    error = torch.softmax(logits, 1) - torch.nn.functional.one_hot(labels, 2)
    chosen, stands_for = coreset(logits, labels, 3)
    weights = stands_for[:, None] * (3 / 12)
    plain, weighted = error[chosen].mean(0), (weights * error[chosen]).mean(0)
    assert torch.allclose(weighted, error.mean(0))
    assert (plain - error.mean(0)).norm() > 0.1


@pytest.mark.parametrize("rule", [Entropy(), Coreset()])
def test_batches_are_parts_of_the_pool(roberta, batch, rule):
    asked = []

    def source(server_round, size):
        asked.append((server_round, size))
        return batch

    chosen = ChosenBatches(source=source, load_model=lambda: roberta, rule=rule)(7, 3)
    assert asked == [(7, 6)]
    assert {name: len(t) for name, t in chosen.items()} == dict.fromkeys(batch, 3)
    rows = [row.tolist() for row in batch["input_ids"]]
    places = [rows.index(row.tolist()) for row in chosen["input_ids"]]
    assert batch["labels"][places].tolist() == chosen["labels"].tolist()


def test_a_small_pool_is_taken_whole(roberta, batch):
    source = ChosenBatches(source=lambda *_: batch, load_model=lambda: roberta)
    assert len(source(1, 32)["labels"]) == 6


@pytest.mark.parametrize("micro_batch_size", [0, 2])
def test_a_weighted_coreset_has_the_gradient_of_its_weighted_loss(
    roberta, batch, micro_batch_size
):
    rule = Coreset(weighted=True)
    source = ChosenBatches(
        source=lambda *_: batch, load_model=lambda: roberta, rule=rule
    )
    chosen = source(1, 3)
    weights = chosen[EXAMPLE_WEIGHTS]
    assert weights.sum() == pytest.approx(3)
    assert (weights * 2).tolist() == (weights * 2).round().tolist()
    partition = model_partition(roberta)
    found = block_gradient(
        roberta, partition, 1, chosen, micro_batch_size=micro_batch_size
    )
    assert found.num_examples == 3
    inputs = {name: t for name, t in chosen.items() if name != EXAMPLE_WEIGHTS}
    roberta.zero_grad()
    each = torch.nn.functional.cross_entropy(
        roberta(**inputs).logits, inputs["labels"], reduction="none"
    )
    loss = (each * weights).sum() / weights.sum()
    loss.backward()
    assert found.loss == pytest.approx(loss.item())
    parameters = dict(roberta.named_parameters())
    for name, gradient in found.gradients.items():
        torch.testing.assert_close(gradient, parameters[name].grad)


def test_weights_are_refused_where_the_loss_is_another(roberta, batch):
    weighed = {**batch, EXAMPLE_WEIGHTS: torch.ones(6)}
    partition = model_partition(roberta)
    usual = block_gradient(roberta, partition, 2, batch)
    assert block_gradient(roberta, partition, 2, weighed).loss == pytest.approx(
        usual.loss
    )
    labels = batch["labels"].clone()
    labels[0] = -100
    with pytest.raises(UserError, match=r"the loss of Roberta.* is another one"):
        block_gradient(roberta, partition, 2, {**weighed, "labels": labels})
    roberta.config.problem_type = "multi_label_classification"
    with pytest.raises(UserError, match=r"classifier's loss.* torch.float32 labels"):
        block_gradient(roberta, partition, 2, {**weighed, "labels": torch.ones(6, 2)})


def test_a_hardened_softmax_tells_who_is_surest():
    logits = torch.tensor([[40.0, 0.0], [60.0, 0.0], [41.0, 0.0]])
    assert most_uncertain(logits, 3, temperature=0.5).tolist() == [0, 2, 1]


def test_samplers_by_name():
    assert sampler_named("random", {}) is None
    assert sampler_named("entropy", {"temperature": 0.1}) == Entropy(temperature=0.1)
    assert sampler_named("coreset", {"weighted": True}) == Coreset(weighted=True)
    assert sampler_named("history", {"measure": "loss"}) == History(measure="loss")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("random", {"temperature": 0.1}, "mean nothing"),
        ("lottery", {}, "'lottery' is unknown; choose from random, entropy"),
        ("entropy", {"temperatur": 1}, "no option 'temperatur'.*mean 'temperature'"),
        ("entropy", {"weighted": True}, "no option 'weighted'"),
        ("entropy", {"temperature": 0}, "temperature=0 must be above 0"),
        ("entropy", {"temperature": "hot"}, "temperature='hot'"),
        ("entropy", {"pool_factor": 1}, "pool_factor=1 must be"),
        ("coreset", {"pool_factor": 2.5}, "pool_factor=2.5 must be"),
        ("coreset", {"weighted": 1}, "weighted=1 must be true or false"),
        ("history", {"measure": "luck"}, "measure='luck' is unknown"),
        ("history", {"uniform": 0}, "uniform=0 must be above 0"),
    ],
)
def test_options_that_make_no_sense(name, options, message):
    with pytest.raises(UserError, match=message):
        sampler_named(name, options)


def test_a_rule_that_is_none(roberta):
    with pytest.raises(UserError, match=r"rule='random' must be"):
        ChosenBatches(source=dict, load_model=lambda: roberta, rule="random")
