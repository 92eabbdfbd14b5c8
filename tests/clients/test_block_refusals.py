"""What a device's own training refuses: other models, servers and messages."""

from __future__ import annotations

import pytest
import torch
from flwr.app import ConfigRecord

from lola_flwr.build import coordinator_for_weights
from lola_flwr.clients import AssignedBlock
from lola_flwr.errors import UserError
from lola_flwr.wire.low_rank import LowRankProjection
from lola_flwr.wire.records import MalformedRecord
from lola_flwr.zeroth_order.mixing import ZerothOrder
from tests.clients.own_project import Net, federate_config, message_to
from tests.flat_settings import grouped
from tests.marks import rest_slow


def test_a_server_that_expects_gradients(model):
    config = federate_config(model, block_index=0)
    del config["update-names"]
    with pytest.raises(UserError, match="make the server's coordinator with"):
        AssignedBlock(model, config)


def test_a_model_without_the_block(model):
    config = federate_config(model, block_index=2)
    model.layers = model.layers[:2]
    with pytest.raises(UserError, match=r"asks for layers\.2\..*, which this model"):
        AssignedBlock(model, config)


def test_another_strategys_message(model):
    message = message_to(model, {"config": ConfigRecord({"lr": 0.1})})
    with pytest.raises(MalformedRecord, match="server-round=None"):
        AssignedBlock(model, message)


def test_another_model(model):
    config = federate_config(model, block_index=0)
    with torch.no_grad():
        model.embed.bias += 1
    other = Net()
    other.load_state_dict(model.state_dict())
    with pytest.raises(UserError, match="load what the server sends"):
        AssignedBlock(other, config)


def test_shared_parameters_are_refused(model):
    model.tail = model.head
    with pytest.raises(UserError, match=r"tail\.weight and head\.weight are one"):
        coordinator_for_weights(model, batch_size=16)


@pytest.mark.parametrize(
    "options",
    rest_slow(
        [
            {"codec": "int8"},
            {"low_rank": LowRankProjection(rank=2)},
            {"codec": "auto"},
            {"codec": "topk:0.1"},
            {"zeroth_order": ZerothOrder(costs=None)},
            {"reduced_schedules": True},
        ],
        2,
    ),
    ids=str,
)
def test_what_is_for_gradients_is_refused_for_weights(roberta, options):
    (name,) = options
    said = rf"^{name}=.* send gradients, and these return"
    with pytest.raises(UserError, match=said):
        coordinator_for_weights(
            roberta, batch_size=16, sequence_length=10, **grouped(options)
        )
