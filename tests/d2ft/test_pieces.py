"""Layers in pieces: what is understood, what is refused, and the whole's gradient."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
import transformers

from lola_flwr.d2ft.branches import contribute, enter, leave
from lola_flwr.d2ft.contexts import contexts_from_mask
from lola_flwr.d2ft.execution import replaced_layers, run_layer
from lola_flwr.d2ft.find import find_subnetworks
from lola_flwr.d2ft.subnetworks import Branch, LayerNotUnderstood
from lola_flwr.errors import UserError
from lola_flwr.model.blocks import partition_parameters
from tests.d2ft.cases import (
    FORWARD,
    FULL,
    SIZES,
    SKIP,
    WORDS,
    Case,
    exact_gradient,
    language_batch,
    make,
    text_batch,
)
from tests.marks import rest_slow


def test_subnetworks_in_pieces_make_the_layer(case):
    torch.manual_seed(2)
    x = torch.randn(3, 7, 32)
    tokens = torch.ones(3, 7, dtype=torch.bool)
    tokens[1, 5:] = False
    told = contexts_from_mask(case.model, case.subnetworks, tokens, num_layers=3)
    for parts, context in zip(case.subnetworks.layers, told, strict=True):
        positions = {"position_embeddings": context.positions}
        own = parts.layer(
            x,
            attention_mask=context.attention_mask,
            **(positions if context.positions else {}),
        )
        for row in ([FULL] * 4, [FULL, FORWARD, FULL, FULL], [FORWARD, FULL] * 2):
            torch.testing.assert_close(run_layer(parts, row, x, context), own)


def test_gradients_of_pieces_are_those_of_the_layer(case):
    operations = case.table(FULL)
    operations[2] = [FULL, FORWARD, FULL, FORWARD]
    result, expected = case.run(operations), exact_gradient(case)
    # Behind the last layer's feed-forward part nothing is left out.
    last = case.subnetworks.layers[2]
    names = {id(p): n for n, p in case.model.named_parameters()}
    down = [n for p in last.down.parameters() if (n := names[id(p)]) in case.trainable]
    assert down
    for group in (0, 2):
        for part in case.subnetworks.slices[8 + group]:
            if part.name in down:
                found = part.of(result.gradients[part.name])
                assert found.any()
                torch.testing.assert_close(
                    found, part.of(expected.gradients[part.name])
                )


def test_slices_cover_each_layer_once(case):
    covered = {}
    for slices in case.subnetworks.slices:
        for part in slices:
            covered.setdefault(part.name, []).append((part.start, part.length))
    parameters = dict(case.model.named_parameters())
    for name, bounds in covered.items():
        dim = next(
            s.dim for group in case.subnetworks.slices for s in group if s.name == name
        )
        ends = [0, *np.cumsum([length for _, length in sorted(bounds)])]
        assert [start for start, _ in sorted(bounds)] == ends[:-1]
        assert ends[-1] == parameters[name].shape[dim]


# Their layers' parts are called as BERT's, and there is more to them.
LOOK_LIKE_BERT = {
    "Nystromformer": {},
    "RoFormer": {},
    "ConvBert": {"embedding_size": 32},
}


@pytest.mark.parametrize("family", LOOK_LIKE_BERT)
def test_layers_that_compute_something_else_are_refused(family):
    torch.manual_seed(0)
    sizes = {**SIZES, **LOOK_LIKE_BERT[family]}
    config = getattr(transformers, f"{family}Config")(**sizes)
    model = getattr(transformers, f"{family}ForSequenceClassification")(config)
    partition = partition_parameters(n for n, _ in model.named_parameters())
    with pytest.raises(
        LayerNotUnderstood, match=rf"{family}Layer\) (computes|runs) .*as those of BERT"
    ):
        find_subnetworks(model, partition)


def test_models_that_are_not_understood():
    sizes = {**SIZES, **WORDS}
    for family, what in {
        "Gemma2": "post_attention_layernorm and pre_feedforward_layernorm",
        "GPTNeoX": r"something else than its sub-networks together \(relative",
        "OPT": "in training only: by its dropout",
    }.items():
        config = getattr(transformers, f"{family}Config")(**sizes)
        model = getattr(transformers, f"{family}ForCausalLM")(config)
        partition = partition_parameters(n for n, _ in model.named_parameters())
        with pytest.raises(LayerNotUnderstood, match=what):
            find_subnetworks(model, partition)
    roberta = make("roberta")
    with pytest.raises(
        UserError, match=r"num_groups=5 must be a whole number from 1 to 4, the heads"
    ):
        find_subnetworks(roberta.model, roberta.partition, num_groups=5)
    decoder = make("llama")
    with pytest.raises(UserError, match=r"num_groups=8 .* 4, the key/value heads of"):
        find_subnetworks(decoder.model, decoder.partition, num_groups=8)


# What has a layer of attention and a feed-forward network, beside the families above.
OTHERS = {
    "Qwen2ForCausalLM": {"num_key_value_heads": 2},
    "Qwen3ForCausalLM": {"num_key_value_heads": 2, "head_dim": 8},
    "MistralForCausalLM": {"num_key_value_heads": 2, "sliding_window": 3},
    "Phi3ForCausalLM": {"num_key_value_heads": 2},
    "LlamaForSequenceClassification": {"num_key_value_heads": 2},
    "GPT2LMHeadModel": {},
    "ModernBertForMaskedLM": {"local_attention": 4, "global_attn_every_n_layers": 2},
    "OPTForCausalLM": {"dropout": 0.0},
    "BertForSequenceClassification": {"attn_implementation": "eager"},
}


@pytest.mark.parametrize("name", rest_slow(OTHERS, 2))
def test_layers_in_pieces_have_the_gradient_of_the_whole(name):
    """In float64, and each group by itself."""
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    batch = text_batch() if "Sequence" in name else language_batch()
    model = kind(kind.config_class(**SIZES | WORDS | OTHERS[name])).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, parameter.shape[-1] ** -0.5)
    assert_same_in_pieces(Case(model, batch))


def test_tokens_that_see_nothing_have_the_gradient_of_the_whole():
    """Of a padded row's first tokens, where attention is masked by large numbers."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES | WORDS, attn_implementation="eager")
    batch = language_batch()
    left = {name: tensor.flip(1) for name, tensor in batch.items()}
    assert (left["attention_mask"][-1, :3] == 0).all()
    case = Case(transformers.LlamaForCausalLM(config).eval(), left)
    assert_same_in_pieces(case, rtol=1e-6)


def assert_same_in_pieces(case, *, rtol=1e-12):
    expected = exact_gradient(case)
    groups = case.subnetworks.num_groups

    def in_pieces(parts, x, context):
        for branch in Branch:
            y = enter(parts, branch, [FULL] * groups, x)
            total = sum(
                contribute(parts, branch, alone(group, groups), y, context)
                for group in range(groups)
            )
            x = leave(parts, branch, [FULL] * groups, x, total)
        return x

    with replaced_layers({p: partial(in_pieces, p) for p in case.subnetworks.layers}):
        found = exact_gradient(case)
    assert found.loss == pytest.approx(expected.loss, rel=rtol)
    for parameter, gradient in expected.gradients.items():
        assert gradient.any()
        torch.testing.assert_close(
            found.gradients[parameter], gradient, rtol=1e3 * rtol, atol=rtol
        )


def alone(group, groups):
    return [FULL if other == group else SKIP for other in range(groups)]
