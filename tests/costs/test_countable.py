"""Which models are counted, with what input, and which are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as hf
from torch import nn

from lola_flwr.costs.examples import training_example
from lola_flwr.costs.of_model import model_costs
from lola_flwr.errors import UserError
from tests.conftest import SMALL
from tests.costs.counting import partition_of
from tests.model.block_cases import CASES as MODELS
from tests.model.block_cases import built

INPUTS = {
    "roberta": {"input_ids": (1, 7), "attention_mask": (1, 7), "labels": (1,)},
    "gpt2 language model": {
        "input_ids": (1, 7),
        "attention_mask": (1, 7),
        "labels": (1, 7),
    },
    "t5 encoder": {"input_ids": (1, 7), "attention_mask": (1, 7), "labels": (1, 7)},
    "vit": {"pixel_values": (1, 3, 32, 32), "labels": (1,)},
    "swin by stages": {"pixel_values": (1, 3, 32, 32), "labels": (1,)},
}


@pytest.mark.parametrize("name", INPUTS)
def test_a_models_input_follows_from_its_configuration(name):
    model = MODELS[name].make()
    example = training_example(model, 7)
    assert {n: tuple(value.shape) for n, value in example.items()} == INPUTS[name]


@pytest.mark.parametrize(
    ("problem", "num_labels", "shape", "dtype"),
    [
        (None, 1, (1,), torch.float32),
        ("regression", 3, (1, 3), torch.float32),
        ("multi_label_classification", 3, (1, 3), torch.float32),
        (None, 3, (1,), torch.long),
    ],
)
def test_labels_are_of_the_problems_kind(problem, num_labels, shape, dtype):
    config = hf.BertConfig(**SMALL, num_labels=num_labels, problem_type=problem)
    model = hf.BertForSequenceClassification(config)
    labels = training_example(model, 7)["labels"]
    assert (tuple(labels.shape), labels.dtype) == (shape, dtype)
    costs = model_costs(model, partition_of(model), batch_size=2, sequence_length=7)
    assert (costs.flops > 0).all()


# Models that have to be told what they read.
NEED_EXAMPLES = {
    "resnet by layers": r'"pixel_values": torch\.zeros\(1, 3, 224, 224\)',
    "resnet by stages": r'"pixel_values": torch\.zeros\(1, 3, 224, 224\)',
    "torchvision's resnet by layers": r"example=torch\.zeros\(1, 3, 224, 224\)",
    "torchvision's resnet by stages": r"example=torch\.zeros\(1, 3, 224, 224\)",
}


@pytest.mark.parametrize(
    "name",
    [
        name
        if name in (*NEED_EXAMPLES, "deberta-v2 with convolution")
        else pytest.param(name, marks=pytest.mark.slow)
        for name in MODELS
    ],
)
def test_every_model_is_counted_or_refused_with_what_to_pass(name):
    case = MODELS[name]
    model, batch = built(case)
    partition = partition_of(model, **case.by_hand)
    options = {"batch_size": 4, "sequence_length": 1 if case.batch == "tensor" else 7}
    if name in NEED_EXAMPLES:
        with pytest.raises(UserError, match=NEED_EXAMPLES[name]) as refusal:
            model_costs(model, partition, **options)
        assert "\n" not in str(refusal.value)
        options["example"] = batch.get("input", batch)
    costs = model_costs(model, partition, **options)
    assert (costs.flops > 0).all()
    assert np.isfinite(costs.memory_bytes).all()


def refused(model, match, *, partition=None, **options):
    sizes = {"batch_size": 2, "sequence_length": 7, **options}
    with pytest.raises(UserError, match=match) as refusal:
        model_costs(model, partition or partition_of(model), **sizes)
    assert "\n" not in str(refusal.value)


def test_what_depends_on_values_needs_weights():
    config = hf.DebertaV2Config(**SMALL)
    with torch.device("meta"):
        model = hf.DebertaV2ForSequenceClassification(config)
    refused(
        model, r"depends on values \(.*aten\.nonzero.* only with weights: load them"
    )


def test_an_input_that_does_not_fit_is_named(roberta):
    example = {"input_ids": torch.zeros(1, 9), "labels": torch.zeros(1)}
    match = r'"input_ids": torch\.zeros\(1, 9\), .* it fails: .*pass example='
    refused(roberta, match, example=example)


class Odd(nn.Module):
    """Four layers whose products PyTorch has no formula for."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.cdist(layer(x), layer(x))
        return x


def test_operations_without_a_formula_are_refused():
    refused(
        Odd(),
        r"aten::_cdist_forward takes is not known.*register_flop_formula",
        example=torch.zeros(1, 4, 4),
    )


def test_a_block_without_a_gradient_is_refused():
    config = hf.LlamaConfig(**SMALL, num_key_value_heads=1, pad_token_id=0)
    model = hf.LlamaForCausalLM(config)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    refused(model, r"has no gradient.*|computes the gradients of all.* use_reentrant")
