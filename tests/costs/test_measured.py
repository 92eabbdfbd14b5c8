from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lola_flwr.costs.measured import measure_costs
from lola_flwr.costs.of_model import model_costs
from lola_flwr.errors import UserError
from lola_flwr.model.blocks import partition_parameters
from tests.model.test_blocks import CASES, batch_of, built


def blocks_of(model, by_hand):
    return partition_parameters((n for n, _ in model.named_parameters()), **by_hand)


def test_convolutions_by_hand():
    """Three 3 x 3 convolutions without bias, on 8 x 8 pixels, and a pooled head."""
    model = nn.Sequential(
        *(nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(3)),
        nn.AvgPool2d(8),
        nn.Flatten(),
        nn.Linear(4, 2),
    )
    partition = blocks_of(model, {"blocks": ["0", "1", "2"]})
    costs = measure_costs(model, partition, torch.ones(2, 4, 8, 8), batch_size=6)
    convolution = 6 * 2 * (4 * 4 * 9) * 64
    head = 6 * 2 * 8
    # All forward; the gradients of the input for the blocks nearer the loss; in the
    # block that of its weights; and both for the head.
    expected = [3 * convolution + (2 - n) * convolution + convolution for n in range(3)]
    np.testing.assert_allclose(costs.flops, np.array(expected) + 3 * head)
    np.testing.assert_array_equal(costs.gradient_bytes, [4 * (4 * 4 * 9 + 10)] * 3)
    # A convolution keeps its input: in block 2 its own, in block 0 those of all three;
    # so does the pooling, and the head keeps 4 numbers of each image.
    kept = [4 * 6 * (4 * 64 * (layers + 1) + 4) for layers in (3, 2, 1)]
    weights = 4 * (3 * 4 * 4 * 9 + 10)
    updates = 4 * (4 * 4 * 9 + 10)
    np.testing.assert_allclose(costs.memory_bytes, np.array(kept) + weights + updates)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_transformer_is_measured_as_it_is_estimated(roberta, batch, attention):
    roberta.set_attn_implementation(attention)
    partition = blocks_of(roberta, {})
    options = {"batch_size": 12, "sequence_length": 10}
    estimated = model_costs(roberta, partition, **options)
    measured = model_costs(roberta, partition, example=batch, **options)
    np.testing.assert_allclose(measured.flops, estimated.flops, rtol=0.08)
    np.testing.assert_array_equal(measured.payload_bits, estimated.payload_bits)
    merged = model_costs(roberta, partition, example=batch, merged=True, **options)
    estimated = model_costs(roberta, partition, merged=True, **options)
    np.testing.assert_allclose(merged.flops, estimated.flops, rtol=0.08)


def test_the_decoder_that_back_propagation_passes_is_counted():
    model, batch = built(CASES["t5 encoder"])
    encoder = blocks_of(model, {"stack": "encoder.block"})
    both = blocks_of(model, {"blocks": r"(encoder|decoder)\.block\.\d+"})
    costs = measure_costs(model, encoder, batch, batch_size=4)
    of_both = measure_costs(model, both, batch, batch_size=4)
    # The encoder's last block is 3 of 6 from the end, with the decoder in between.
    np.testing.assert_allclose(costs.flops, of_both.flops[:3])
    assert (costs.flops > of_both.flops[3:].min()).all()


def test_the_model_stays_as_it_is():
    model, batch = built(CASES["resnet by stages"])
    model.train()
    before = {name: values.clone() for name, values in model.state_dict().items()}
    example = {"pixel_values": batch["pixel_values"][:1]}
    partition = blocks_of(model, {"stack": "resnet.encoder.stages"})
    costs = measure_costs(model, partition, example, batch_size=32)
    assert (np.diff(costs.flops) < 0).all(), "earlier blocks cost more"
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    for name, values in model.state_dict().items():
        assert torch.equal(values, before[name])


_CONV1 = r"What (conv1|layer1\.0\.conv1)\.weight of shape"
REFUSED = {
    "resnet by layers": r"What resnet\.encoder\.stages\.0\..* of shape",
    "torchvision's resnet by stages": _CONV1,
    "resnet by stages": r"What resnet\.encoder\.stages\.0\..* of shape \(8, 8, 3, 3\)",
    "torchvision's resnet by layers": _CONV1,
    "t5 encoder": r"passes decoder\.block\.0\..*, which belongs to no block",
    "swin by stages": r"different widths \(8, 16, 32\)",
    "swin by layers": r"passes swin\.encoder\.layers\.0\.downsample",
}


@pytest.mark.parametrize("name", CASES)
def test_what_the_estimate_does_not_know_is_refused(name):
    case = CASES[name]
    model = case.make()
    partition = blocks_of(model, case.by_hand)
    options = {"batch_size": 4, "sequence_length": 1 if case.batch == "tensor" else 7}
    if name not in REFUSED:
        assert (model_costs(model, partition, **options).flops > 0).all()
        return
    with pytest.raises(UserError, match=REFUSED[name]) as refusal:
        model_costs(model, partition, **options)
    assert "pass example=" in str(refusal.value)
    batch = batch_of(case.batch)
    example = batch.get("input", batch)
    costs = model_costs(model, partition, example=example, **options)
    assert (costs.flops > 0).all()
