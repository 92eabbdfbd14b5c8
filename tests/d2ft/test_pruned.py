"""Pruned models: the whole ones without some heads and neurons, or a refusal."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from lola_flwr.d2ft.cuts import cuts_of
from lola_flwr.d2ft.pruning import Pruning, num_pruned
from lola_flwr.device.prefix import skeleton_of
from lola_flwr.errors import UserError
from lola_flwr.model.adapter_blocks import model_partition
from lola_flwr.model.blocks import partition_parameters
from tests.d2ft.pruned_families import (
    FAMILIES,
    HALF,
    batch_of,
    built,
    outputs,
    pruned_copy,
    zeroed,
)
from tests.marks import rest_slow

RATES = st.floats(0, 1, exclude_max=True)
BELOW_1 = math.nextafter(1, 0)

# Of a layer: heads of keys, and neurons.
NUM_HEADS, NUM_NEURONS = 4, 64

once = cache(built)  # what tests leave as it is


@pytest.mark.parametrize("family", rest_slow(FAMILIES, fast=2))
@settings(max_examples=12)
@given(heads=RATES, neurons=RATES)
@example(heads=0.0, neurons=0.0)
@example(heads=BELOW_1, neurons=BELOW_1)
@example(heads=0.25, neurons=0.0)
@example(heads=0.0, neurons=1 / NUM_NEURONS)
def test_a_pruned_model_is_the_whole_one_without_some_parts(family, heads, neurons):
    model = once(family)
    pruned, cuts = pruned_copy(model, Pruning(heads=heads, neurons=neurons))
    batch = batch_of(model)
    torch.testing.assert_close(
        outputs(pruned, batch),
        outputs(zeroed(model, cuts), batch),
        rtol=1e-4,
        atol=1e-4,
    )
    rates = ((NUM_HEADS, heads), (NUM_NEURONS, neurons))
    shares = {1 - num_pruned(count, rate) / count for count, rate in rates}
    assert {len(cut.kept) / cut.width for cut in cuts.values()} == shares - {1.0}
    before, after = dict(model.named_parameters()), dict(pruned.named_parameters())
    for path in cuts:
        name = f"{path}.weight"
        assert after[name].numel() < before[name].numel()
    same = [n for n in before if n.rpartition(".")[0] not in cuts]
    assert all(torch.equal(before[name], after[name]) for name in same)


def test_what_is_left_of_a_model_changes_what_it_computes():
    """What the comparison above would not see."""
    model = once("roberta")
    batch = batch_of(model)
    pruned, _ = pruned_copy(model, HALF)
    assert (outputs(pruned, batch) - outputs(model, batch)).abs().max() > 1e-2


@torch.no_grad()
def test_the_least_by_norm_go():
    model = once("llama")
    _, cuts = pruned_copy(model, HALF)
    for index, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        of_heads = [
            sum(
                float(part.double().square().sum())
                for part in (
                    attention.q_proj.weight[8 * head : 8 * head + 8],
                    attention.k_proj.weight[4 * head : 4 * head + 4],
                    attention.v_proj.weight[4 * head : 4 * head + 4],
                    attention.o_proj.weight[:, 8 * head : 8 * head + 8],
                )
            )
            for head in range(NUM_HEADS)
        ]
        stay = sorted(sorted(range(NUM_HEADS), key=lambda h: -of_heads[h])[:2])
        prefix = f"model.layers.{index}."
        queries = cuts[f"{prefix}self_attn.q_proj"].kept
        assert [*queries] == [8 * head + n for head in stay for n in range(8)]
        keys = cuts[f"{prefix}self_attn.k_proj"].kept
        assert [*keys] == [4 * head + n for head in stay for n in range(4)]
        of_neurons = [
            float(
                mlp.gate_proj.weight[n].double().square().sum()
                + mlp.up_proj.weight[n].double().square().sum()
                + mlp.down_proj.weight[:, n].double().square().sum()
            )
            for n in range(NUM_NEURONS)
        ]
        best = sorted(range(NUM_NEURONS), key=lambda n: -of_neurons[n])
        for name in ("gate_proj", "up_proj", "down_proj"):
            assert [*cuts[f"{prefix}mlp.{name}"].kept] == sorted(best[:32])


def test_of_equal_ones_the_first_stay():
    model = built("roberta")
    for parameter in model.parameters():
        parameter.data.fill_(0.1)
    cuts = cuts_of(model, model_partition(model), HALF)
    for cut in cuts.values():
        assert [*cut.kept] == [*range(cut.width // 2)]


def test_what_is_drawn_is_a_function_of_the_seed():
    model = once("roberta")
    drawn = Pruning(heads=0.5, neurons=0.5, criterion="random")

    def kept(pruning, seed):
        cuts = cuts_of(model, model_partition(model), pruning, seed=seed)
        return np.concatenate([cut.kept for cut in cuts.values()]).tolist()

    assert kept(drawn, 1) == kept(drawn, 1) != kept(drawn, 2)
    assert kept(HALF, 1) == kept(HALF, 2) != kept(drawn, 1)
    layers = [
        cut.kept.tolist()
        for path, cut in cuts_of(model, model_partition(model), drawn).items()
        if path.endswith("intermediate.dense")
    ]
    assert layers[0] != layers[1]


@given(count=st.integers(1, 500), rate=RATES)
@example(count=10, rate=0.3)
@example(count=1, rate=BELOW_1)
def test_no_more_than_the_rate_goes_and_not_all(count, rate):
    gone = num_pruned(count, rate)
    assert 0 <= gone < count
    assert gone <= rate * count + 1e-6
    assert gone == count - 1 or gone + 1 > rate * count - 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 1}, r"heads=1 must be a share of at least 0 and below 1"),
        ({"neurons": -0.1}, r"neurons=-0\.1 must be"),
        ({"neurons": math.nan}, r"neurons=nan must be"),
        ({"heads": True}, r"heads=True must be"),
        ({"heads": "half"}, r"heads='half' must be"),
        ({"criterion": "size"}, r"criterion='size' is unknown; choose from norm, ra"),
        ({"head": 0.5}, r"no option 'head'; it has .*\. Did you mean 'heads'\?"),
    ],
)
def test_options_that_are_none_are_refused(options, message):
    with pytest.raises(UserError, match=message) as raised:
        Pruning.of(options)
    assert "\n" not in str(raised.value)


def test_nothing_is_pruned_where_no_rate_says_so():
    assert Pruning.of({}) is Pruning.of({"heads": 0, "criterion": "random"}) is None
    assert Pruning.of({"neurons": 0.1}) == Pruning(neurons=0.1)


class _Counts(nn.Module):
    """Attention of RoBERTa whose code knows a number that nothing shows."""

    def __init__(self, attention):
        super().__init__()
        self.query, self.key, self.value = (
            attention.query,
            attention.key,
            attention.value,
        )
        self.attention_head_size = attention.attention_head_size
        self._known = attention.num_attention_heads

    def forward(self, hidden, *_, attention_mask=None, **__):
        query, key, value = (
            part(hidden).unflatten(-1, (self._known, -1)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        mixed = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask
        )
        return mixed.transpose(1, 2).flatten(2), None


def with_hidden_count():
    model = built("roberta")
    for layer in model.roberta.encoder.layer:
        layer.attention.self = _Counts(layer.attention.self)
    return model.eval()


def phi3():
    config = hf.Phi3Config(
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_hidden_layers=2,
        vocab_size=60,
        pad_token_id=0,
    )
    return hf.Phi3ForCausalLM(config).eval()


def gemma2():
    config = hf.Gemma2Config(
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        num_hidden_layers=2,
        vocab_size=60,
    )
    return hf.Gemma2ForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (with_hidden_count, r"does not run with fewer heads .* leave heads at 0"),
        (phi3, r"Phi3ForCausalLM does not run with fewer heads"),
        (gemma2, r"of which one is known; .* leave pruning at ''"),
        (lambda: skeleton_of(lambda: FAMILIES["roberta"]()), r"this model has none"),
    ],
)
def test_a_model_of_which_it_is_not_known_is_refused(make, message):
    with pytest.raises(UserError, match=message) as raised:
        pruned_copy(make(), HALF)
    assert "\n" not in str(raised.value)


def test_layers_that_share_a_map_are_refused():
    model = built("roberta")
    first, second = model.roberta.encoder.layer
    second.output.dense = first.output.dense
    names = [name for name, _ in model.named_parameters()]
    partition = partition_parameters(names, stack="roberta.encoder.layer")
    with pytest.raises(UserError, match=r"0\.output\.dense is of two layers") as raised:
        cuts_of(model, partition, HALF)
    assert "\n" not in str(raised.value)


def test_neurons_alone_go_where_heads_cannot():
    model = phi3()
    pruned, cuts = pruned_copy(model, Pruning(neurons=0.5))
    batch = batch_of(model)
    torch.testing.assert_close(
        outputs(pruned, batch), outputs(zeroed(model, cuts), batch)
    )
