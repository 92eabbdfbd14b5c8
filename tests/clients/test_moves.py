"""How a device's move is sent: types, codecs, what it counts from."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from flwr.app import Array, ConfigRecord

from lola_flwr.build import coordinator_for_weights
from lola_flwr.clients import AssignedBlock, block_mod
from lola_flwr.errors import UserError
from tests.clients.own_project import (
    APPS,
    Net,
    federate,
    federate_config,
    make_app,
    message_to,
    moved,
    plain_train,
    prepared_train,
    reply_content,
    statistics,
)
from tests.marks import rest_slow


@pytest.mark.parametrize("kind", APPS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_weights_of_other_types(model, monkeypatch, kind, dtype):
    """They travel as they are; the server steps in float32."""
    make = Net.__init__
    monkeypatch.setattr(Net, "__init__", lambda net: (make(net), net.to(dtype))[0])
    before = dict(copy.deepcopy(model.to(dtype)).named_parameters())
    records, result, _ = federate(model, APPS[kind](), rounds=2)
    assert [record.refused for record in records] == [{}, {}]
    for name, values in before.items():
        array = result.arrays[name].numpy()
        assert array.dtype == values.numpy(force=True).dtype
    assert {n for n in moved(model, result) if n.startswith("layers.0")}


def test_bfloat16_is_refused(model):
    with pytest.raises(UserError, match=r"embed\.weight is of type bfloat16, .*float"):
        coordinator_for_weights(model.bfloat16(), batch_size=16)


@pytest.mark.parametrize("codec", rest_slow(["fp16", "bf16"]))
@pytest.mark.parametrize("kind", APPS)
def test_moves_travel_in_a_codec(model, kind, codec):
    """Weights, of which most are larger than their moves, would not survive it."""
    exact, rounded = (
        federate(model, APPS[kind](), rounds=2, codec=c) for c in ("fp32", codec)
    )
    assert [record.refused for record in rounded[0]] == [{}, {}]
    state = model.state_dict()
    for name, array in exact[1].arrays.items():
        move = array.numpy() - state[name].numpy()
        other = rounded[1].arrays[name].numpy() - state[name].numpy()
        difference = np.abs(move - other).max()
        assert difference <= 2**-6 * np.abs(move).max(initial=0.0)
    for reply in rounded[2]:
        arrays = reply.content["arrays"]
        types = {n: a.numpy().dtype.itemsize for n, a in arrays.items()}
        wanted = 4 if kind == "knows nothing" else 2
        assert {types[n] for n in types if n not in statistics(model)} == {wanted}


def test_moves_are_from_what_was_received_whenever_it_is_loaded(model):
    config = ConfigRecord({**federate_config(model, block_index=0), "codec": "fp16"})
    message = message_to(model, {"config": config})
    device_model = copy.deepcopy(model)
    with torch.no_grad():
        device_model.head.bias += 3.0
    block = AssignedBlock(device_model, message)
    device_model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    with torch.no_grad():
        device_model.head.bias += 0.25
    content = block.finish(reply_content(device_model, 0.5))
    exponent, value = content["arrays"]["head.bias"].numpy().tolist()
    assert value * 2**exponent == pytest.approx(-0.25, rel=1e-3)


def test_returned_arrays_of_other_shapes(model):
    def train(message, context):
        reply = plain_train(message, context)
        reply.content["arrays"]["head.weight"] = Array(np.zeros(4, np.float32))
        return reply

    config = ConfigRecord({**federate_config(model, block_index=0), "codec": "fp16"})
    message = message_to(model, {"config": config})
    said = r"head.weight was received with shape \(1, 4\) and is returned with \(4,\)"
    with pytest.raises(UserError, match=said):
        block_mod(message, None, train)


def test_weights_are_planned_as_they_are_sent(model):
    """The codec, and parts of the head's policy, are what devices do."""
    kinds = [{"head": "every"}, {"head": "shallowest"}, {"codec": "fp16"}]
    for options in kinds:
        records, _, replies = federate(model, make_app(prepared_train), **options)
        planned = {b.device: b.payload_bytes for b in records[0].blocks}
        received = {b.device: b.received_bytes for b in records[0].blocks}
        assert len(replies) == len(planned) == 3
        for device, nbytes in received.items():
            # Beside the arrays there are their names, and the message around them.
            assert 0 < planned[device] - nbytes < 900 + 13 * (315 + 128 + 40)
