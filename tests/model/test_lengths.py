from __future__ import annotations

import math
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from lola_flwr.model.adapter_blocks import model_partition
from lola_flwr.model.backprop import evenly
from lola_flwr.model.lengths import (
    ByLength,
    cut,
    padding_of,
    pass_tokens,
    per_token,
    without_padding,
)
from tests.conftest import SMALL


def batch_of(lengths, width=None, *, on_left=False):
    width = width or max(lengths)
    ids, mask = torch.zeros(2, len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        place = slice(width - length, None) if on_left else slice(0, length)
        ids[row, place] = torch.arange(1, length + 1) + 100 * row
        mask[row, place] = 1
    labels = torch.arange(len(lengths))
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def cost(lengths, ends, each):
    return sum((end - start) * lengths[start] + each for start, end in pairwise(ends))


@settings(max_examples=50)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    each=st.sampled_from([0.0, 1.5, 20.0, 500.0]),
    most_examples=st.integers(1, 8),
    half=st.booleans(),
)
def test_no_cut_costs_less(lengths, each, most_examples, half):
    lengths = sorted(lengths, reverse=True)
    most_tokens = -(-len(lengths) // 2) * lengths[0] if half else math.inf

    def allowed(ends):
        runs = [*pairwise(ends)]
        return all(end - start <= most_examples for start, end in runs) and all(
            (end - start) * lengths[start] <= most_tokens for start, end in runs[1:]
        )

    inner = range(1, len(lengths))
    every = [
        [0, *chosen, len(lengths)]
        for count in range(len(lengths))
        for chosen in combinations(inner, count)
    ]
    found = cut(
        lengths, pass_tokens=each, most_examples=most_examples, most_tokens=most_tokens
    )
    assert allowed(found)
    assert found[0] == 0
    assert found[-1] == len(lengths)
    least = min(cost(lengths, ends, each) for ends in every if allowed(ends))
    assert cost(lengths, found, each) == pytest.approx(least)


@pytest.mark.parametrize("on_left", [False, True])
def test_micro_batches_hold_each_example_once_without_needless_padding(on_left):
    lengths = [3, 9, 2, 9, 3, 4, 2, 12]
    batch = batch_of(lengths, 14, on_left=on_left)
    split = ByLength(per_token(batch), pass_tokens=2)
    parts = [*split(batch, 0)]
    widths = [part["input_ids"].shape[1] for part in parts]
    assert widths == sorted(widths, reverse=True)
    assert sum(part["input_ids"].numel() for part in parts) < 1.2 * sum(lengths)
    assert sorted(int(n) for part in parts for n in part["labels"]) == [*range(8)]
    for part in parts:
        assert part["attention_mask"].sum(dim=1).max() == part["input_ids"].shape[1]
        for label, ids in zip(part["labels"], part["input_ids"], strict=True):
            words = batch["input_ids"][label]
            assert ids[ids > 0].tolist() == words[words > 0].tolist()
    assert all(len(part["labels"]) <= 3 for part in split(batch, 3))


def test_micro_batches_but_the_first_take_half_of_the_tokens():
    batch = batch_of([10, *[9] * 7])
    parts = [*ByLength(per_token(batch), pass_tokens=1)(batch, 0)]
    first, *others = [part["input_ids"].numel() for part in parts]
    assert first == 10
    assert sorted(others) == [27, 36]  # and not 63, beside a sum of gradients


@pytest.mark.parametrize("size", [0, 1, 4, 10])
def test_examples_of_one_length_are_cut_as_ever(size):
    batch = batch_of([5] * 10)
    parts = [*ByLength(per_token(batch), pass_tokens=0)(batch, size)]
    for part, other in zip(parts, evenly(batch, size), strict=True):
        for name, values in part.items():
            assert torch.equal(values, other[name])
    assert size in range(1, 10) or parts == [batch]


@pytest.mark.parametrize("lengths", [[4], [9, 8, 9, 7]])
def test_what_saves_less_than_a_pass_is_one_batch_in_its_order(lengths):
    batch = batch_of(lengths)
    assert [*ByLength(per_token(batch), pass_tokens=10)(batch, 0)] == [batch]


def test_padding_to_more_than_the_longest_is_cut_off():
    batch = batch_of([4, 3, 4], 9)
    (part,) = ByLength(per_token(batch), pass_tokens=10)(batch, 0)
    assert part["input_ids"].shape == (3, 4)
    assert part["labels"].tolist() == [0, 1, 2]


def test_padding_is_known_where_it_is_on_one_side():
    assert padding_of(batch_of([2, 3])).lengths.tolist() == [2, 3]
    assert padding_of(batch_of([2, 3], on_left=True)).on_left
    holes = batch_of([5, 5])
    holes["attention_mask"][0, 2] = 0
    assert padding_of(holes).lengths.tolist() == [5, 5]
    both = batch_of([2, 5])
    both["attention_mask"] = both["attention_mask"].roll(1, dims=1)
    assert padding_of(both) is None
    nothing = batch_of([2, 5])
    nothing["attention_mask"][0] = 0
    assert padding_of(nothing) is None
    square = {"attention_mask": torch.ones(2, 1, 5, 5)}
    assert padding_of(square) is None
    assert padding_of({"pixel_values": torch.ones(2, 3, 5, 5)}) is None
    (part,) = ByLength(frozenset(), 0)({"pixel_values": torch.ones(2, 3)}, 0)
    assert part["pixel_values"].shape == (2, 3)


def test_labels_of_as_many_classes_as_tokens_are_not_cut():
    batch = batch_of([3, 4])
    batch["labels"] = torch.zeros(2, 4)
    batch["boxes"] = torch.zeros(2, 4, 4)
    names = per_token(batch)
    assert names == {"input_ids", "attention_mask", "boxes"}
    part = without_padding(batch, names, padding_of(batch), np.array([0]))
    assert part["labels"].shape == (1, 4)
    assert part["boxes"].shape == (1, 3, 4)


def test_a_pass_counts_for_less_the_larger_the_layers_are(roberta):
    torch.manual_seed(0)
    config = transformers.RobertaConfig(**SMALL | {"intermediate_size": 512})
    larger = transformers.RobertaForSequenceClassification(config)
    tokens = pass_tokens(roberta, model_partition(roberta))
    assert tokens > pass_tokens(larger, model_partition(larger)) > 100
    for other in (larger.bfloat16(), roberta.to("meta")):
        assert pass_tokens(other, model_partition(other)) == math.inf
