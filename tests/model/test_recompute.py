from __future__ import annotations

import copy
import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import transformers as hf
from torch import nn

from lola_flwr.errors import UserError
from lola_flwr.model.adapter_blocks import model_partition
from lola_flwr.model.adapters import adapt
from lola_flwr.model.backprop import block_gradient, train_mode
from lola_flwr.model.blocks import partition_parameters
from lola_flwr.model.recompute import recomputed_suffix, suffix_modules
from lola_flwr.model.recording import NoGradient
from tests.conftest import SMALL
from tests.marks import rest_slow

TOKENS = torch.arange(5, 45).reshape(4, 10)


def classifier():
    # Dropout is on.
    config = hf.RobertaConfig(**SMALL, max_position_embeddings=40)
    return hf.RobertaForSequenceClassification(config), torch.tensor([0, 1, 0, 1])


def decoder():
    config = hf.LlamaConfig(
        **SMALL, num_key_value_heads=1, attention_dropout=0.1, pad_token_id=0
    )
    assert config.use_cache
    return hf.LlamaForCausalLM(config), TOKENS


def adapted(base="fp32"):
    torch.manual_seed(0)
    wide = {**SMALL, "hidden_size": 64, "intermediate_size": 128}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**wide, pad_token_id=0))
    return adapt(model, "lora", {"r": 4, "lora_dropout": 0.1}, base=base), TOKENS


def quantised():
    pytest.importorskip("bitsandbytes")
    return adapted("nf4")


def gpt2():
    config = hf.GPT2Config(vocab_size=60, n_embd=16, n_head=2, n_layer=3)
    return hf.GPT2LMHeadModel(config), TOKENS


def gradients(model, partition, block, batch, *, recompute):
    torch.manual_seed(7)
    if not recompute:
        return block_gradient(model, partition, block, batch)
    with recomputed_suffix(model, partition, block):
        return block_gradient(model, partition, block, batch)


@pytest.mark.parametrize(
    "make", rest_slow([classifier, decoder, adapted, quantised, gpt2], fast=2)
)
def test_the_gradient_is_the_same(make):
    model, labels = make()
    train_mode(model)
    partition = model_partition(model)
    mask = torch.ones_like(TOKENS)
    mask[0, -3:] = 0
    batch = {"input_ids": TOKENS, "attention_mask": mask, "labels": labels}
    runs = []
    layers = [m for n, m in model.named_modules() if n.endswith((".0", ".1", ".2"))]
    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda *_, index=index: runs.append(index))
    paths = suffix_modules(model, partition, 0)
    assert [model.get_submodule(path) for path in paths] == layers
    inside = paths[0] + "."
    before = {n: vars(m).get("forward") for n, m in model.named_modules()}
    own = next(m for n, m in model.named_modules() if n.startswith(inside))
    own.register_forward_pre_hook(lambda *_: runs.append("inside"))
    for block in range(partition.num_blocks):
        once = gradients(model, partition, block, batch, recompute=False)
        assert runs.count("inside") == 1
        runs.clear()
        twice = gradients(model, partition, block, batch, recompute=True)
        # What is inside the layers from the block on runs twice, and no other.
        assert runs.count("inside") == (2 if block == 0 else 1)
        runs.clear()
        assert twice.loss == once.loss
        for name, values in once.gradients.items():
            torch.testing.assert_close(
                twice.gradients[name], values, rtol=1e-6, atol=1e-8
            )
    after = {n: vars(m).get("forward") for n, m in model.named_modules()}
    assert after == before
    assert getattr(model.config, "use_cache", True)


class Stages(nn.Module):
    """Two stages of layers in lists, and a head in the same list as the last."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.stages = nn.ModuleList(
            nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2))
            for _ in range(2)
        )
        self.stages[1].append(nn.Linear(4, 2))

    def forward(self, x):
        x = self.stem(x)
        for stage in self.stages:
            for layer in stage:
                x = layer(x)
        return x


def test_the_largest_modules_of_one_block_run_twice():
    model = Stages()
    names = [name for name, _ in model.named_parameters()]
    by_stages = partition_parameters(
        names, blocks=["stages.0", r"stages\.1\.0|stages\.1\.1"]
    )
    assert suffix_modules(model, by_stages, 0) == [
        f"stages.{stage}.{layer}" for stage in (0, 1) for layer in (0, 1)
    ]
    assert suffix_modules(model, by_stages, 1) == ["stages.1.0", "stages.1.1"]
    by_layers = partition_parameters(names, blocks=r"stages\.\d\.[01]")
    assert suffix_modules(model, by_layers, 3) == ["stages.1.1"]


class Layer(nn.Module):
    """Does what is given besides its product."""

    def __init__(self, besides):
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.besides = copy.deepcopy(besides)

    def forward(self, x):
        return self.inner(self.besides(x)).relu() + x


class Net(nn.Module):
    def __init__(self, besides, behind=lambda x: x):
        super().__init__()
        self.layers = nn.ModuleList(Layer(besides) for _ in range(2))
        self.behind = behind

    def forward(self, x):
        for layer in self.layers:
            given = x.clone()
            x = layer(x=given)
            self.behind(given)
        return x


class Counting(nn.Module):
    """Does something else each time."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.calls * x


def squared_output(model, batch):
    return model(**batch).square().sum()


def both_ways(model):
    partition = partition_parameters(n for n, _ in model.named_parameters())
    batch = {"x": torch.randn(5, 3, generator=torch.Generator().manual_seed(0))}
    found = []
    for recompute in (False, True):
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        torch.manual_seed(1)
        with recomputed_suffix(model, partition, 0) if recompute else nullcontext():
            done = block_gradient(
                model, partition, 0, batch, loss_function=squared_output
            )
        found.append(done.gradients)
        found.append(random.random() + np.random.random())  # noqa: NPY002
    return found


def test_all_random_numbers_are_drawn_again():
    def draws(x):
        factor = random.random() + np.random.random()  # noqa: NPY002
        return factor * torch.rand_like(x) * x

    once, next_once, twice, next_twice = both_ways(Net(draws))
    for name, values in once.items():
        torch.testing.assert_close(twice[name], values, rtol=1e-6, atol=1e-8)
    assert next_twice == next_once


@pytest.mark.parametrize(
    "model",
    [
        Net(lambda x: x.mul_(2)),
        Net(lambda x: 2 * x, behind=lambda x: x.mul_(2)),
        Net(Counting()),
        Net(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))),
    ],
    ids=["input inside", "input behind", "number", "buffer"],
)
def test_layers_that_are_not_the_same_the_second_time_are_refused(model):
    with pytest.raises(UserError, match=r"(Net|Layer) cannot be recomputed: .*micro-b"):
        both_ways(model)


def test_a_block_without_a_gradient_stays_refused(roberta, batch):
    roberta.train()
    roberta.gradient_checkpointing_enable({"use_reentrant": True})
    partition = partition_parameters(n for n, _ in roberta.named_parameters())
    with pytest.raises(NoGradient):
        gradients(roberta, partition, 1, batch, recompute=True)
