"""Whether training drops attention weights, by looking."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from lola_flwr.costs.dropout import dropped_heads
from lola_flwr.costs.of_model import model_costs
from lola_flwr.errors import UserError
from lola_flwr.model.adapters import adapt
from lola_flwr.model.blocks import partition_parameters
from tests.costs.test_measured import CASES
from tests.model.text_families import tiny_model

# Under which name each configuration has the rate.
RATES = {
    "Bert": "attention_probs_dropout_prob",
    "Roberta": "attention_probs_dropout_prob",
    "DebertaV2": "attention_probs_dropout_prob",
    "DistilBert": "attention_dropout",
    "GPT2": "attn_pdrop",
    "Llama": "attention_dropout",
    "XLNet": "dropout",
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", RATES)
def test_heads_are_seen_whatever_they_are_called(family, attention):
    for rate, heads in ((0.3, 2), (0.0, 0)):
        model = tiny_model(family, **{RATES[family]: rate})
        if model._supports_sdpa:
            model.set_attn_implementation(attention)
        assert dropped_heads(model) == heads


def test_adapters_and_images(rng):
    pytest.importorskip("peft")
    adapted = adapt(tiny_model("DistilBert"), "lora", {"lora_dropout": 0.1})
    assert dropped_heads(adapted) == 2
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4}
    config = transformers.ViTConfig(
        **sizes,
        **{"image_size": 16, "patch_size": 4, "num_hidden_layers": 2},
        **{"attention_probs_dropout_prob": 0.1},
    )
    assert dropped_heads(transformers.ViTForImageClassification(config)) == 4


def test_the_model_and_the_random_numbers_stay():
    model = tiny_model("Bert")
    model.classifier.train()
    modes = {name: module.training for name, module in model.named_modules()}
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    assert dropped_heads(model) == 2
    assert torch.equal(torch.rand(2), expected)
    assert modes == {name: module.training for name, module in model.named_modules()}


class Own(nn.Module):
    """A model of no library's, of which no input is known."""

    def __init__(self, rate):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 16, rate) for _ in range(2)
        )
        self.head = nn.Linear(8, 2)


def test_a_model_that_cannot_be_looked_at_is_refused():
    assert dropped_heads(Own(0.0)) == 0
    with pytest.raises(UserError, match=r"Own has dropout.*pass example="):
        dropped_heads(Own(0.1))
    options = {"batch_size": 2, "sequence_length": 5}
    partition = partition_parameters(n for n, _ in Own(0.1).named_parameters())
    with pytest.raises(UserError, match="pass example="):
        model_costs(Own(0.1), partition, **options)
    # Where examples are no sequences there is no attention over them.
    assert (model_costs(Own(0.1), partition, batch_size=2).flops > 0).all()


def test_dropped_attention_takes_memory():
    model = tiny_model("DistilBert")
    quiet = tiny_model("DistilBert", attention_dropout=0.0)
    partition = partition_parameters(n for n, _ in model.named_parameters())
    options = {"batch_size": 2, "sequence_length": 30}
    dropped, kept = (
        model_costs(one, partition, **options).memory_bytes for one in (model, quiet)
    )
    # Of each layer on the way back: three maps of two heads and a hidden state, of
    # 2 x 30 tokens in float32.
    maps = 4 * 2 * 30 * (3 * 2 * 30 + 16)
    np.testing.assert_allclose(dropped - kept, [2 * maps, maps])


def test_a_language_model_of_two_stacks_is_given_both_inputs():
    assert dropped_heads(CASES["t5 encoder and decoder"].make()) == 2
