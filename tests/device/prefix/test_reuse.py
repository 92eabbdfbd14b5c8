"""The layers below a block run once for each sample, and give the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lola_flwr.device.prefix import ActivationCache, reused_prefix
from lola_flwr.model.backprop import block_gradient
from tests.device.prefix.families import FAMILIES, assert_same, bert, partition_of


class Calls:
    """Counts how often each layer of a stack really runs."""

    def __init__(self, layers):
        self.counts = [0] * len(layers)
        for index, layer in enumerate(layers):
            # A stand-in takes the place of the layer, but not of what is inside.
            inner = next(m for m in layer.modules() if isinstance(m, nn.LayerNorm))
            inner.register_forward_hook(
                lambda *_, index=index: self.counts.__setitem__(
                    index, self.counts[index] + 1
                )
            )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("block_index", [0, 1, 2])
def test_gradient_is_the_plain_one(family, block_index, batch):
    make, make_batch = FAMILIES[family]
    torch.manual_seed(0)
    model, batch = make().eval(), make_batch(batch)
    partition = partition_of(model)
    expected = block_gradient(model, partition, block_index, batch)
    cache = ActivationCache(10**6)
    for _ in ("cold", "warm"):
        with reused_prefix(model, partition, block_index, cache):
            result = block_gradient(model, partition, block_index, batch)
        assert_same(result, expected)
    assert cache.hits == (6 if block_index else 0)
    with reused_prefix(model, partition, block_index):
        assert_same(block_gradient(model, partition, block_index, batch), expected)
    # Nothing stays behind.
    assert_same(block_gradient(model, partition, block_index, batch), expected)
    assert not any("forward" in vars(module) for module in model.modules())


def test_layers_below_run_once_per_sample(roberta, batch):
    partition = partition_of(roberta)
    calls = Calls(roberta.roberta.encoder.layer)
    cache = ActivationCache(10**6)
    with reused_prefix(roberta, partition, 2, cache):
        for _ in range(3):
            block_gradient(roberta, partition, 2, batch, micro_batch_size=2)
    assert calls.counts == [3, 3, 9]  # three micro-batches of two samples
    # Over another call, as in the next round.
    with reused_prefix(roberta, partition, 2, cache):
        block_gradient(roberta, partition, 2, batch)
    # One sample shows what a layer returns.
    assert calls.counts == [4, 4, 10]
    assert cache.hits == 2 * 6 + 6


def test_dropout_is_off_below_and_on_above(roberta, batch):
    partition = partition_of(roberta)
    cache = ActivationCache(10**6)
    layer = roberta.roberta.encoder.layer[2]
    roberta.train()

    def gradient(seed):
        torch.manual_seed(seed)
        given = []
        with reused_prefix(roberta, partition, 2, cache):
            hook = layer.register_forward_pre_hook(
                lambda _, args: given.append(args[0])
            )
            result = block_gradient(roberta, partition, 2, batch)
            hook.remove()
        return result, given[0]

    (first, hidden), (again, _), (other, kept) = map(gradient, (1, 1, 2))
    assert_same(again, first)
    assert other.loss != first.loss
    torch.testing.assert_close(kept[:4], hidden[:4])
    assert all(module.training for module in roberta.modules())
    states = []
    layer.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    roberta.eval()(**batch)
    torch.testing.assert_close(hidden[:4], states[0][:4])


CHANGES = {
    "in place": lambda p: p.detach().add_(0.1),
    "through data": lambda p: p.data.mul_(1.5),
    "new data": lambda p: setattr(p, "data", p.data + 0.1),
    "through numpy": lambda p: np.add(p.detach().numpy(), 0.1, out=p.detach().numpy()),
    "nothing": lambda p: None,
}


@pytest.mark.slow
@settings(max_examples=25)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["embeddings.word", "layer.0", "layer.1", "layer.2"]),
            st.sampled_from(sorted(CHANGES)),
            st.integers(1, 2),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_never_a_stale_activation(steps):
    torch.manual_seed(0)
    model = bert().eval()
    partition = partition_of(model)
    cache = ActivationCache(10**6)
    batch = {
        "input_ids": torch.randint(5, 60, (3, 6)),
        "attention_mask": torch.ones(3, 6, dtype=torch.long),
        "labels": torch.tensor([0, 1, 1]),
    }
    for place, change, block_index in steps:
        name = next(n for n, _ in model.named_parameters() if place in n)
        CHANGES[change](model.get_parameter(name))
        expected = block_gradient(model, partition, block_index, batch)
        with reused_prefix(model, partition, block_index, cache):
            result = block_gradient(model, partition, block_index, batch)
        assert_same(result, expected)


def test_a_change_between_two_steps_is_seen(roberta, batch):
    partition = partition_of(roberta)
    with reused_prefix(roberta, partition, 2, ActivationCache(10**6)):
        before = block_gradient(roberta, partition, 2, batch)
        with torch.no_grad():
            roberta.roberta.encoder.layer[0].output.dense.weight.mul_(3)
        after = block_gradient(roberta, partition, 2, batch)
    assert after.loss != before.loss
    assert_same(block_gradient(roberta, partition, 2, batch), after)


def test_other_weights_of_the_same_shape_share_nothing(batch, tmp_path):
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = bert().eval()
        partition = partition_of(model)
        cache = ActivationCache(10**6, tmp_path)
        expected = block_gradient(model, partition, 1, batch)
        with reused_prefix(model, partition, 1, cache):
            assert_same(block_gradient(model, partition, 1, batch), expected)
        assert cache.hits == 0


def test_a_cache_on_disk_serves_a_new_process(roberta, batch, tmp_path):
    partition = partition_of(roberta)
    expected = block_gradient(roberta, partition, 2, batch)
    for hits in (0, 6):
        cache = ActivationCache(10**6, tmp_path)
        with reused_prefix(roberta, partition, 2, cache):
            assert_same(block_gradient(roberta, partition, 2, batch), expected)
        assert cache.hits == hits


def test_a_cache_that_is_too_small_costs_time_only(roberta, batch):
    partition = partition_of(roberta)
    expected = block_gradient(roberta, partition, 2, batch)
    cache = ActivationCache(10 * 16 * 4)
    with reused_prefix(roberta, partition, 2, cache):
        for _ in range(2):
            assert_same(block_gradient(roberta, partition, 2, batch), expected)
    assert cache.num_bytes <= cache.max_bytes
