from __future__ import annotations

import numpy as np
import pytest
import torch

from lola_flwr.blocks import partition_parameters
from lola_flwr.clients import BlockClient, BlockDevice
from lola_flwr.codec import CODECS
from lola_flwr.errors import UserError
from lola_flwr.models import fingerprint
from lola_flwr.protocol import Assignment, MalformedRecord, UpdateReport
from lola_flwr.system.devices import DeviceProfile, simulated_device


@pytest.fixture
def client(roberta, batch):
    partition = partition_parameters(n for n, _ in roberta.named_parameters())
    return BlockClient(
        BlockDevice(
            profile=simulated_device(3, seed=0),
            load_model=lambda: (roberta, partition),
            batch_source=lambda server_round, batch_size: {
                name: values[:batch_size] for name, values in batch.items()
            },
        )
    )


def assignment_for(model, **changes):
    partition = partition_parameters(n for n, _ in model.named_parameters())
    fields = {
        "server_round": 2,
        "block_index": 1,
        "share": 0.5,
        "batch_size": 4,
        "codec": "fp32",
        "base_fingerprint": fingerprint(model, partition.frozen),
    }
    return Assignment(**{**fields, **changes}).to_record()


def trainable_values(model):
    partition = partition_parameters(n for n, _ in model.named_parameters())
    parameters = dict(model.named_parameters())
    return [parameters[name].numpy(force=True).copy() for name in partition.trainable]


def test_profile(client):
    properties = client.get_properties({})
    assert DeviceProfile.from_properties(properties) == simulated_device(3, seed=0)


def test_fit_returns_the_gradient_at_the_received_values(client, roberta, batch):
    roberta.config.hidden_dropout_prob = 0
    for module in roberta.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    roberta.set_attn_implementation("eager")
    values = [array + 0.01 for array in trainable_values(roberta)]
    update, num_examples, metrics = client.fit(values, assignment_for(roberta))

    partition = partition_parameters(n for n, _ in roberta.named_parameters())
    for expected, name in zip(values, partition.trainable, strict=True):
        np.testing.assert_array_equal(roberta.state_dict()[name], expected)
    roberta.requires_grad_(True).train()
    roberta(**{name: tensor[:4] for name, tensor in batch.items()}).loss.backward()
    parameters = dict(roberta.named_parameters())
    for gradient, name in zip(update, partition.update_names(1), strict=True):
        np.testing.assert_allclose(
            gradient, parameters[name].grad.numpy(), rtol=1e-4, atol=1e-6
        )
    assert num_examples == 4
    report = UpdateReport.from_record(metrics)
    assert (report.server_round, report.block_index) == (2, 1)
    assert report.update_kind == "gradient"
    assert report.compute_s > 0
    assert report.compute_clock == "measured"


def test_dropout_is_a_function_of_seed_round_and_device(client, roberta):
    values = trainable_values(roberta)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    first, _, _ = client.fit(values, assignment_for(roberta))
    assert torch.equal(torch.get_rng_state(), before), "the device's own state is kept"
    torch.manual_seed(456)
    again, _, _ = client.fit(values, assignment_for(roberta))
    later, _, _ = client.fit(values, assignment_for(roberta, server_round=3))
    for one, two in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, two)
    assert any(not np.array_equal(a, b) for a, b in zip(first, later, strict=True))


def test_codec_is_the_one_asked_for(client, roberta):
    values = trainable_values(roberta)
    plain, _, _ = client.fit(values, assignment_for(roberta))
    packed, _, _ = client.fit(values, assignment_for(roberta, codec="bf16"))
    for exact, wire in zip(plain, packed, strict=True):
        assert wire.dtype == np.uint16
        np.testing.assert_allclose(
            CODECS["bf16"].decode(wire, exact.shape), exact, rtol=2**-8, atol=1e-30
        )


def test_another_base_is_noticed(client, roberta):
    assignment = assignment_for(roberta, base_fingerprint="other")
    with pytest.raises(UserError, match=r"frozen base weights .* differ"):
        client.fit(trainable_values(roberta), assignment)


def test_another_model_is_noticed(client, roberta):
    values = trainable_values(roberta)
    with pytest.raises(UserError, match="arrays received"):
        client.fit(values[:-1], assignment_for(roberta))
    values[0] = values[0][:, :-1]
    with pytest.raises(UserError, match=r"has shape \(16, 16\) here but \(16, 15\)"):
        client.fit(values, assignment_for(roberta))


def test_config_without_an_assignment(client):
    with pytest.raises(MalformedRecord, match="server-round=None"):
        client.fit([], {})
