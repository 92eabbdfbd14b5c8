from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from lola_flwr.device.sampling import ChosenBatches, coreset, most_uncertain
from lola_flwr.errors import UserError


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
        chosen = coreset(logits, labels, 3)
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
    chosen = coreset(logits, torch.zeros(6, dtype=torch.long), 2)
    assert 5 in chosen.tolist()


@pytest.mark.parametrize("rule", ["entropy", "coreset"])
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


def test_nonsense_is_refused(roberta):
    with pytest.raises(UserError, match=r"pool_factor=1"):
        ChosenBatches(source=dict, load_model=lambda: roberta, pool_factor=1)
    with pytest.raises(UserError, match=r"rule='random' is unknown"):
        ChosenBatches(source=dict, load_model=lambda: roberta, rule="random")
