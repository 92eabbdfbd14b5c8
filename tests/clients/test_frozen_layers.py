"""What a project froze stays frozen, does not travel, and costs what it costs."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from flwr.app import Message
from torch import nn

from lola_flwr.build import coordinator_for, coordinator_for_weights, trainer_for
from lola_flwr.clients import AssignedBlock
from lola_flwr.costs.of_model import model_costs
from lola_flwr.errors import UserError
from lola_flwr.model.adapter_blocks import model_partition
from lola_flwr.model.blocks import BlockPartition, BlocksNotFound, partition_parameters
from tests.clients.own_project import (
    Net,
    federate,
    federate_config,
    fit,
    make_app,
    moved,
    reply_content,
    statistics,
)

EXAMPLE = torch.ones(2, 3)


def frozen_net(*starts):
    """Return a model of which the parameters with these starts of a name are frozen."""
    torch.manual_seed(3)
    model = Net()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(starts))
    return model


def names_of(model, *starts):
    return {name for name, _ in model.named_parameters() if name.startswith(starts)}


def test_blocks_are_what_wants_gradients():
    partition = model_partition(frozen_net("layers.0", "layers.2.norm", "head.bias"))
    assert partition.blocks == (
        *[tuple(f"layers.1.{p}.{k}" for p in ("linear", "norm") for k in KINDS)],
        ("layers.2.linear.weight", "layers.2.linear.bias"),
    )
    assert partition.head == ("head.weight",)
    every = {*partition.frozen, *partition.trainable}
    assert every == names_of(Net(), "")
    assert len(partition.frozen) + len(partition.trainable) == len(every)


KINDS = ("weight", "bias")


def test_where_only_the_head_is_left_it_is_the_block():
    partition = model_partition(frozen_net("embed", "layers"))
    assert partition.blocks == (("head.weight", "head.bias"),)
    assert partition.head == ()


def test_nothing_to_train():
    with pytest.raises(BlocksNotFound, match="All parameters of blocks and head are"):
        model_partition(frozen_net(""))
    empty = BlockPartition(blocks=(("a",),), head=("b",), frozen=("c",))
    assert empty.freezing({"c", "x"}) == empty


@pytest.mark.parametrize(
    "frozen", [("layers.0",), ("layers.1",), ("embed", "layers"), ("layers.2.norm",)]
)
def test_frozen_layers_neither_change_nor_travel(frozen):
    model = frozen_net(*frozen)

    def train(message, context):
        own = frozen_net(*frozen)
        own.load_state_dict(message.content["arrays"].to_torch_state_dict())
        block = AssignedBlock(own, message)
        loss = fit(own, message.content["config"])
        return Message(block.finish(reply_content(own, loss), loss), reply_to=message)

    records, result, replies = federate(
        model, make_app(train), rounds=2, example=EXAMPLE
    )
    assert [record.refused for record in records] == [{}, {}]
    trained = names_of(model, "") - names_of(model, *frozen)
    assert moved(model, result) == trained | statistics(model)
    sent = {name for reply in replies for name in reply.content["arrays"]}
    assert sent == trained | statistics(model)


def test_what_runs_before_the_blocks_is_counted():
    """Frozen layers run forward, and back-propagation passes those behind a block."""
    model, batch = frozen_net("layers.0", "layers.1"), {"batch_size": 16}
    costs = model_costs(model, model_partition(model), **batch)
    whole = model_costs(Net(), model_partition(Net()), example=EXAMPLE, **batch)
    np.testing.assert_array_equal(costs.flops, whole.flops[2:])
    np.testing.assert_array_equal(costs.payload_bits, whole.payload_bits[2:])
    coordinator_for_weights(model, **batch)


def test_blocks_by_name_do_not_train_what_is_frozen():
    model = frozen_net("layers.1")
    partition = partition_parameters(name for name, _ in model.named_parameters())
    costs = model_costs(Net(), partition, batch_size=16)
    for build, options in (
        (coordinator_for, {"costs": costs}),
        (trainer_for, {"schedules": None}),
    ):
        with pytest.raises(UserError, match=r"layers\.1\..* is frozen .*model_partiti"):
            build(model, partition, **options)


def test_a_device_that_froze_what_the_server_asks_for():
    model = frozen_net()
    # It is prepared several times, and not restored.
    for block_index in (1, 2, 1):
        block = AssignedBlock(
            model, federate_config(frozen_net(), block_index=block_index)
        )
        fit(model, {}, steps=1)
        block.arrays()
    with pytest.raises(UserError, match=r"layers\.1\..* this device's code has frozen"):
        AssignedBlock(
            frozen_net("layers"), federate_config(frozen_net(), block_index=1)
        )


@pytest.mark.parametrize("restored", [False, True])
def test_a_device_that_freezes_it_in_its_training(restored):
    model = frozen_net()
    block = AssignedBlock(model, federate_config(frozen_net(), block_index=1))
    model.layers.requires_grad_(False)
    fit(model, {}, steps=1)
    if restored:
        block.__exit__(None, None, None)
        assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(UserError, match=r"layers\.1\..* this device's code has frozen"):
        block.fit_result(16)


def test_a_block_that_froze_nothing_can_be_finished_after_its_end():
    model = frozen_net()
    config = federate_config(frozen_net(), block_index=1)
    AssignedBlock(
        model, federate_config(frozen_net(), block_index=2)
    )  # leaves its traces
    with AssignedBlock(model, config) as block:
        fit(model, {}, steps=1)
    before = copy.deepcopy(block.arrays())
    assert before.keys() == block.arrays().keys()


def test_sequential_models_are_seen_as_layers():
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)], nn.Linear(4, 2))
    model[0].requires_grad_(False)
    partition = model_partition(model, blocks=["0", "1", "2"])
    assert partition.blocks == tuple((f"{n}.weight", f"{n}.bias") for n in (1, 2))
    costs = model_costs(model, partition, batch_size=4)
    # Forward through four; the head's gradient and its input's; and the block's own.
    last, layer, head = costs.flops[1], 2 * 4 * 16, 2 * 4 * 8
    assert last == 3 * layer + 3 * head + layer
    assert costs.flops[0] == last + layer
