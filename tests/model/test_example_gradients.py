"""Every example's gradient, many at once, is the one that it has alone."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from lola_flwr.model.adapter_blocks import model_partition
from lola_flwr.model.adapters import adapt
from lola_flwr.model.backprop import block_gradient, num_examples_of
from lola_flwr.model.blocks import BlockPartition, partition_parameters
from lola_flwr.model.example_gradients import example_gradients
from tests.model.text_families import FAMILIES, SIZES, tiny_model

# Whose layers take relative positions, too, which all examples share; or hidden states
# with the tokens first; and one that takes a single example where none may be padded.
ONE_BY_ONE = {"DebertaV2", "XLNet", "GPT2"}
COUNT, WIDTH = 7, 9


def sentences(count=COUNT, vocabulary=14):
    """Sentences of 3 to 9 tokens, padded."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, vocabulary, (count, WIDTH), generator=generator)
    lengths = 3 + torch.arange(count) * 5 % (WIDTH - 2)
    mask = (torch.arange(WIDTH) < lengths[:, None]).long()
    labels = torch.arange(count) % 2
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def given(batch, model, partition, **options):
    def batch_of(chosen):
        return {name: values[chosen] for name, values in batch.items()}

    count = num_examples_of(batch)
    return example_gradients(model, partition, batch_of, count, **options)


def values_of(model, partition):
    parameters = dict(model.named_parameters())
    return {n: 1.1 * parameters[n].detach().numpy() for n in partition.trainable}


def rows_of(values):
    """Return two rows of what has more, in no order, and all of everything else."""
    return {
        name: np.array([3, 1]) if array.ndim > 1 and len(array) > 3 else None
        for name, array in values.items()
    }


def check(model, batch, partition=None, **options):
    """Compare with one after the other; tell whether many were computed at once."""
    partition = partition or model_partition(model)
    values = values_of(model, partition)
    rows = rows_of(values)
    gradients = given(batch, model, partition, **options)
    chosen = np.array([5, 0, 2, 6, 3])
    # The second time nothing is tried.
    for _ in range(2):
        found = gradients(values, chosen, rows)
    assert found.keys() == values.keys()
    blocks = [*range(partition.num_blocks)]
    for place, number in enumerate(chosen):
        one = {name: array[[number]] for name, array in batch.items()}
        alone = block_gradient(model, partition, blocks, one, **options).gradients
        for names in (*partition.blocks, partition.head):
            scale = max(alone[name].abs().max() for name in names)
            assert scale > 0
            for name in names:
                wanted = alone[name].numpy()
                wanted = wanted if rows[name] is None else wanted[rows[name]]
                apart = np.abs(found[name][place] - wanted.reshape(-1)).max()
                assert apart <= 1e-4 * scale, name
    return gradients.is_separable


@pytest.mark.parametrize("family", FAMILIES)
def test_of_every_family_they_are_those_of_one_example_alone(family, caplog):
    logging.getLogger("lola_flwr").propagate = True
    model = tiny_model(family)
    # Its layers are the same one, run twice.
    shared = {"blocks": r"albert\.encoder\.albert_layer_groups\.0"}
    partition = model_partition(model, **(shared if family == "Albert" else {}))
    assert check(model, sentences(), partition) == (family not in ONE_BY_ONE)
    assert ("one after the other" in caplog.text) == (family in ONE_BY_ONE)


@pytest.mark.parametrize(
    ("tuner", "options", "at_once"),
    [
        ("lora", {"target_modules": ["query", "value"]}, True),
        ("lora", {"target_modules": "all-linear", "lora_bias": True}, True),
        ("lora", {"target_modules": ["query"], "use_dora": True}, False),
        ("ia3", {"target_modules": ["key"], "feedforward_modules": []}, False),
    ],
)
def test_of_adapters(tuner, options, at_once):
    model = adapt(tiny_model("Bert"), tuner, options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Not zero, as one half of an adapter is at first.
            if "lora_" in name:
                parameter.normal_()
    assert check(model, sentences()) == at_once


def causal_loss(model, batch):
    return model(**batch).loss


def num_learned(batch):
    return int((batch["labels"][:, 1:] != -100).sum())


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_of_decoders_whose_losses_are_means_over_tokens(family):
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
    torch.manual_seed(0)
    kinds = {"Llama": "LlamaForCausalLM", "GPT2": "GPT2LMHeadModel"}
    model = getattr(transformers, kinds[family])(config)
    batch = sentences()
    labels = torch.where(batch["attention_mask"] > 0, batch["input_ids"], -100)
    assert check(
        model,
        {**batch, "labels": labels},
        loss_function=causal_loss,
        batch_weight=num_learned,
    )


def test_of_images_which_have_no_mask():
    config = transformers.ViTConfig(
        **{name: SIZES[name] for name in ("hidden_size", "intermediate_size")},
        **{"num_hidden_layers": 2, "num_attention_heads": 2},
        **{"image_size": 8, "patch_size": 4},
    )
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(config)
    images = torch.randn(COUNT, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    batch = {"pixel_values": images, "labels": torch.arange(COUNT) % 2}
    assert check(model, batch)


class Layers(nn.Module):
    """Two blocks with a norm and a convolution, and what a test makes of them."""

    def __init__(self, between=lambda model, hidden: hidden):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv1d(4, 4, 3, padding=1), nn.GroupNorm(2, 4))
            for _ in range(2)
        )
        self.head = nn.Linear(4, 2)
        self.between = between

    def forward(self, hidden, labels):
        for layer in self.layers:
            hidden = self.between(self, layer(hidden).relu_())
        return nn.functional.cross_entropy(self.head(hidden.mean(dim=2)), labels)


def layers_of(between=None):
    model = Layers() if between is None else Layers(between)
    names = [name for name, _ in model.named_parameters()]
    blocks = tuple(
        tuple(n for n in names if n.startswith(f"layers.{k}.")) for k in range(2)
    )
    partition = BlockPartition(
        blocks=blocks, head=("head.weight", "head.bias"), frozen=()
    )
    batch = {
        "hidden": torch.randn(COUNT, 4, 6, generator=torch.Generator().manual_seed(1)),
        "labels": torch.arange(COUNT) % 2,
    }
    return model, batch, partition


def loss_of(model, batch):
    return model(**batch)


def test_of_modules_of_any_kind_that_keep_examples_apart():
    assert check(*layers_of(), loss_function=loss_of)


@pytest.mark.parametrize(
    "between",
    [
        # Examples mix.
        lambda model, hidden: hidden + 3 * hidden.mean(dim=0),
        # A parameter that not only its module uses.
        lambda model, hidden: hidden * model.head.bias.exp().sum(),
        # A module whose call says nothing of examples.
        lambda model, hidden: hidden + model.head(torch.ones(1, 4)).sum(),
    ],
)
def test_where_that_is_not_the_same_they_are_computed_one_after_the_other(between):
    assert not check(*layers_of(between), loss_function=loss_of)


def test_their_mean_is_the_gradient_of_the_batch_without_dropout(roberta):
    partition = partition_parameters(name for name, _ in roberta.named_parameters())
    batch = sentences(5, vocabulary=60)
    values = values_of(roberta, partition)
    roberta.train()
    every = dict.fromkeys(values)
    found = given(batch, roberta, partition)(values, np.arange(5), every)
    assert not roberta.training
    parameters = dict(roberta.named_parameters())
    for name, array in values.items():
        np.testing.assert_array_equal(parameters[name].detach(), array)
        assert parameters[name].grad is None
        assert parameters[name].requires_grad
    blocks = [*range(partition.num_blocks)]
    whole = block_gradient(roberta, partition, blocks, batch).gradients
    for name, gradient in whole.items():
        mean = found[name].mean(axis=0).reshape(gradient.shape)
        np.testing.assert_allclose(mean, gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("labels", "groups"),
    [
        ([0, 1] * 10, [0, 1] * 10),
        ([7] * 12 + [3] * 8, [1] * 12 + [0] * 8),
        # Of a class with few examples the mean tells little.
        ([7] * 12 + [3] * 8 + [1] * 7, [0] * 27),
        ([1, 2, 3], [0] * 3),
        # No classes: numbers, a label for each token, none.
        ([0.5, 1.5] * 10, [0] * 20),
        ([[0, 1], [1, 0]] * 8, [0] * 16),
        (None, [0] * 9),
    ],
)
def test_examples_of_a_class_are_a_group(labels, groups):
    batch = {"input_ids": torch.zeros(len(groups), 4)}
    if labels is not None:
        batch["labels"] = torch.tensor(labels)
    model = tiny_model("Bert")
    found = given(batch, model, model_partition(model)).groups
    assert found.tolist() == groups
