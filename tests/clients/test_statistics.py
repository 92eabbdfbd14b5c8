"""Running statistics and other buffers that devices return."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import Array

from lola_flwr.clients import block_mod
from tests.clients.own_project import (
    all_but_embedding,
    federate,
    make_app,
    moved,
    plain_train_of,
    prepared_train,
    statistics,
)


def test_statistics_are_the_mean_of_the_devices(model):
    _, result, replies = federate(model, make_app(prepared_train))
    for name in statistics(model):
        sent = [reply.content["arrays"][name].numpy() for reply in replies]
        expected = np.mean(sent, axis=0)
        assert not np.array_equal(expected, model.state_dict()[name].numpy())
        np.testing.assert_allclose(result.arrays[name].numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "value"),
    [("running_var", -1.0), ("running_mean", 1e9), ("running_mean", float("nan"))],
)
def test_statistics_that_cannot_be_are_refused(model, name, value):
    def lie(message, context):
        reply = prepared_train(message, context)
        arrays = reply.content["arrays"]
        key = f"layers.1.norm.{name}"
        arrays[key] = Array(np.full((4,), value, np.float32))
        return reply

    records, result, _ = federate(model, make_app(lie))
    assert records[0].refused == {"implausible": 3}
    assert moved(model, result) == set()


def test_buffers_inside_layers_do_not_matter(model):
    """The mod knows names of arrays only; the server says which are to be returned."""
    for index, layer in enumerate(model.layers):
        layer.register_buffer(f"mask_{index}", torch.ones(2))

    def train(message, context):
        reply = plain_train_of(model, message)
        return reply

    records, result, replies = federate(model, make_app(train, [block_mod]))
    assert records[0].refused == {}
    assert moved(model, result) == all_but_embedding(model) | {
        name for name in statistics(model) if "mask" not in name
    }
    assert not any("mask" in n for r in replies for n in r.content["arrays"])
