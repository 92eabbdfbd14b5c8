"""Inputs found for models of any kind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lola_flwr.costs.of_model import model_costs
from lola_flwr.model.found import found_blocks
from lola_flwr.model.plain_input import plain_input
from tests.marks import rest_slow
from tests.model.block_cases import perceptron
from tests.model.plain_models import ActorCritic, Quickstart, TextCnn, sequence


def flattened(side, pool, channels=1):
    """Return a network that flattens images of that side, rounded down."""
    width = channels * (side // pool) ** 2
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1),
        *[nn.MaxPool2d(pool), nn.Flatten(), nn.Linear(width, 2)],
    )


@pytest.mark.parametrize(
    ("side", "pool", "known"),
    rest_slow(
        [
            (32, 1, 32),
            (28, 2, 28),  # 28 and 29 fit
            (50, 1, 50),  # no usual size, but one alone
            (50, 2, None),  # 50 and 51 fit, neither of them usual
            (32, 16, None),  # up to 47
            (48, 48, None),  # 64 and 84, too
        ],
        fast=2,
    ),
)
def test_sizes_are_found_where_one_fits(side, pool, known):
    found = plain_input(flattened(side, pool))
    assert found.known == (known is not None)
    assert found.example.shape[2:] == (side, side)


@pytest.mark.slow
def test_lengths_are_found_where_one_fits():
    def net(pool, width):
        return nn.Sequential(
            nn.Conv1d(3, 2, 5), nn.MaxPool1d(pool), nn.Flatten(), nn.Linear(width, 2)
        )

    found = plain_input(net(1, 2 * 46))
    assert (found.known, tuple(found.example.shape)) == (True, (1, 3, 50))
    assert not plain_input(net(2, 2 * 23)).known


def test_tokens_are_known_where_they_are_told():
    partition, example = found_blocks(TextCnn(), sequence_length=12)
    assert tuple(example.shape) == (1, 12)
    assert partition == found_blocks(TextCnn(), torch.zeros(2, 9, dtype=torch.long))[0]


def test_all_that_a_model_returns_is_counted():
    def flops(give):
        model = ActorCritic(give)
        partition, example = found_blocks(model)
        return model_costs(model, partition, batch_size=8, example=example).flops

    np.testing.assert_array_equal(flops(tuple), flops(lambda t: {"a": t[0], "b": t[1]}))
    # Of the value: its weight's gradient, and its input's.
    one = flops(lambda outputs: outputs[0])
    np.testing.assert_array_equal(flops(tuple) - one, 2 * 2 * 8 * 6)


def test_inputs_are_of_the_weights_type():
    for dtype in (torch.float64, torch.float16):
        _, example = found_blocks(perceptron().to(dtype))
        assert example.dtype == dtype


def test_trying_leaves_the_model_as_it_is():
    model = sequence("a b", [Quickstart(), nn.Linear(10, 10)])
    model.again = model.b  # one module under two names
    model.b.eval()
    before = {
        name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()
    }
    plain_input(model)
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert id(tensor) == before[name][0]
        assert tensor.equal(before[name][1])
    assert model.a.training
    assert not model.b.training
