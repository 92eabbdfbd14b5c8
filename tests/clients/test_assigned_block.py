"""An existing project's own training under the strategy, in this process."""

from __future__ import annotations

import copy
from itertools import product

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message
from torch.utils.checkpoint import checkpoint

from lola_flwr.clients import AssignedBlock
from lola_flwr.errors import UserError
from lola_flwr.model.adapters import adapt
from lola_flwr.model.recording import NoGradient
from lola_flwr.system.devices import simulated_device
from tests.clients.own_project import (
    APPS,
    Net,
    all_but_embedding,
    federate,
    federate_config,
    fit,
    make_app,
    moved,
    plain_train,
    prepared_train,
    reply_content,
    statistics,
)
from tests.marks import rest_slow


@pytest.mark.parametrize("kind", APPS)
def test_blocks_move_and_the_rest_stays(model, kind):
    records, result, replies = federate(model, APPS[kind](), rounds=2)
    assert [record.refused for record in records] == [{}, {}]
    assert moved(model, result) == all_but_embedding(model) | statistics(model)
    sent = [len(reply.content["arrays"]) for reply in replies]
    ignored = [block.ignored_arrays for block in records[0].blocks]
    if kind == "knows nothing":
        assert set(sent) == {len(model.state_dict())}
        assert all(ignored)
        assert records[0].train_loss is None
    else:
        assert set(sent) == {2 + 2 + 2 + 3 * 3}
        assert not any(ignored)
        assert records[0].train_loss is not None
        assert all(b.compute_clock == "measured" for b in records[0].blocks)


def test_a_projects_own_adapters():
    def adapted():
        options = {"target_modules": ["linear"], "modules_to_save": ["head"]}
        return adapt(Net(), "lora", options).train()

    def train(message, context):
        model = adapted()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        block = AssignedBlock(model, message)
        loss = fit(model, message.content["config"])
        return Message(block.finish(reply_content(model, loss), loss), reply_to=message)

    torch.manual_seed(3)
    model = adapted()
    records, result, replies = federate(model, make_app(train), rounds=2)
    assert [record.refused for record in records] == [{}, {}]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert moved(model, result) == trained | statistics(model)
    # The adapter, the head, and the statistics of three layers.
    assert {len(reply.content["arrays"]) for reply in replies} == {2 + 2 + 3 * 3}


def test_the_move_is_the_devices_own_over_the_number_of_blocks(model):
    _, result, replies = federate(model, make_app(prepared_train))
    before = model.state_dict()
    for reply in replies:
        for name, array in reply.content["arrays"].items():
            if name.startswith("head") or name in statistics(model):
                continue
            start = before[name].numpy()
            np.testing.assert_allclose(
                result.arrays[name].numpy() - start,
                (array.numpy() - start) / 3,
                rtol=1e-4,
                atol=1e-7,
            )


@pytest.mark.parametrize(("num_devices", "kind"), rest_slow(product([1, 2], APPS)))
def test_fewer_devices_than_blocks_train_all_of_them(model, kind, num_devices):
    records, result, replies = federate(
        model, APPS[kind](), rounds=2, num_devices=num_devices
    )
    assert [record.refused for record in records] == [{}, {}]
    for record in records:
        trained = [block for part in record.blocks for block in part.blocks]
        assert (trained, len(record.blocks)) == ([0, 1, 2], num_devices)
    assert moved(model, result) == all_but_embedding(model) | statistics(model)
    if num_devices == 1 and kind != "knows nothing":
        # All of the model by one device: that is its own training, as with FedAvg.
        for name, array in replies[-1].content["arrays"].items():
            np.testing.assert_allclose(
                result.arrays[name].numpy(), array.numpy(), rtol=1e-5, atol=1e-7
            )


def test_training_lowers_the_loss(model):
    records, _, _ = federate(model, make_app(prepared_train), rounds=15)
    losses = [record.train_loss for record in records]
    assert np.mean(losses[-3:]) < 0.7 * losses[0]


def test_a_prepared_model_back_propagates_to_its_block_only(model):
    config = federate_config(model, block_index=2)
    with AssignedBlock(model, config) as block:
        fit(model, {}, steps=1)
        wanting = {n for n, p in model.named_parameters() if p.grad is not None}
    assert wanting == {
        f"layers.2.{n}"
        for n in ("linear.weight", "linear.bias", "norm.weight", "norm.bias")
    } | {"head.weight", "head.bias"}
    assert set(block.arrays()) == wanting | statistics(model)
    flags = {name for name, p in model.named_parameters() if p.requires_grad}
    assert flags == all_but_embedding(model), "flags are restored"


def test_a_device_that_trains_all_returns_its_block(model):
    model.layers[0].norm.weight.requires_grad_(False)
    config = federate_config(model, block_index=2, **{"trains-all": True})
    with AssignedBlock(model, config) as block:
        fit(model, {}, steps=1)
        wanting = {n for n, p in model.named_parameters() if p.grad is not None}
    assert wanting == all_but_embedding(model) - {"layers.0.norm.weight"}
    asked = {*config["update-names"].splitlines()}
    assert all(name.startswith(("layers.2.", "head.")) for name in asked)
    assert set(block.arrays()) == asked | statistics(model)


@pytest.mark.parametrize(
    ("reentrant", "compiled"),
    [(None, False), (None, True), (False, False), (True, False), (True, True)],
)
def test_a_block_that_got_no_gradient_is_not_returned(model, reentrant, compiled):
    """Re-entrant checkpoints cut off a block whose input wants no gradient."""

    class Checkpointed(Net):
        def forward(self, x):
            x = self.embed(x)
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=reentrant)
            return self.head(x)

    if reentrant is not None:
        model = Checkpointed()
    # The server has the model without: of this one it would refuse to count the costs.
    plain = Net()
    plain.load_state_dict(model.state_dict())
    block = AssignedBlock(model, federate_config(plain, block_index=1))
    start = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    run = torch.compile(model, backend="eager") if compiled else model
    run(torch.randn(4, 3)).square().mean().backward()
    optimizer.step()
    if reentrant:
        with pytest.raises(NoGradient, match=r"layers\.\d.* has no gradient"):
            block.fit_result(16)
    else:
        block.fit_result(16)
        names = block.assignment.update_names.splitlines()
        assert all((model.state_dict()[n] != start[n]).any() for n in names)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_numpy_client_result(model):
    config = federate_config(model, block_index=1)
    block = AssignedBlock(model, config)
    arrays, examples, metrics = block.fit_result(16, {"mine": 1}, loss=0.5)
    assert [array.shape for array in arrays[:6]] == [
        *((4, 4), (4,), (4,), (4,)),
        *((1, 4), (1,)),
    ]
    assert [array.shape for array in arrays[6:]] == [(4,), (4,), ()] * 3
    assert examples == 16
    assert metrics["mine"] == 1
    assert (metrics["update-kind"], metrics["block-index"]) == ("weights", 1)
    assert metrics["loss"] == 0.5
    block = AssignedBlock(model, {**config, "codec": "fp16"})
    with torch.no_grad():
        model.head.bias += 0.25
    arrays, _, metrics = block.fit_result(16)
    assert metrics["update-kind"] == "moves"
    # An exponent, then the gradient that a step with a rate of 1 undoes.
    exponent, value = arrays[5].tolist()
    assert value * 2**exponent == pytest.approx(-0.25, rel=1e-3)
    assert [array.shape for array in arrays[6:]] == [(4,), (4,), ()] * 3


def test_a_proximal_term_of_the_projects_own(model):
    def drift(mu):
        config = ConfigRecord({"proximal-mu": mu})
        _, result, _ = federate(model, make_app(prepared_train), train_config=config)
        before = model.state_dict()
        return sum(
            float(np.abs(result.arrays[name].numpy() - before[name].numpy()).sum())
            for name in all_but_embedding(model)
        )

    assert drift(10.0) < 0.8 * drift(0.0)


def test_fedadam_by_configuration(model):
    options = {"betas": (0.9, 0.99), "eps": 1e-3}
    _, result, _ = federate(
        model,
        make_app(prepared_train),
        optimizer="Adam",
        lr=0.01,
        optimizer_options=options,
    )
    # Adam's first step is lr * m / (|m| + eps): at most lr, and near it for m >> eps.
    before = model.state_dict()
    largest = max(
        float(np.abs(result.arrays[n].numpy() - before[n].numpy()).max())
        for n in all_but_embedding(model)
    )
    assert 0.009 < largest <= 0.01 + 1e-6


def test_devices_without_a_profile_can_be_given_one(model):
    app = make_app(plain_train, profile=False)
    with pytest.raises(UserError, match="No device has reported a usable profile"):
        federate(model, app)
    assumed = simulated_device(0, seed=0)
    records, _, _ = federate(model, app, assumed_profile=assumed)
    assert [block.status for block in records[0].blocks] == ["accepted"] * 3
    assert len({block.device for block in records[0].blocks}) == 3
