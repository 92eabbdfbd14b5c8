from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from lola_flwr.model.backprop import block_gradient, model_loss
from lola_flwr.model.blocks import (
    BlocksNotFound,
    partition_parameters,
)
from tests.conftest import SMALL

# Architecture -> (configuration, classifier, stack, first names of head parameters).
FAMILIES = {
    "roberta": (
        hf.RobertaConfig(**SMALL),
        hf.RobertaForSequenceClassification,
        "roberta.encoder.layer",
        {"classifier.dense", "classifier.out_proj"},
    ),
    "bert": (
        hf.BertConfig(**SMALL),
        hf.BertForSequenceClassification,
        "bert.encoder.layer",
        {"bert.pooler.dense", "classifier"},
    ),
    "distilbert": (
        hf.DistilBertConfig(
            dim=16, hidden_dim=32, n_heads=2, n_layers=3, vocab_size=60
        ),
        hf.DistilBertForSequenceClassification,
        "distilbert.transformer.layer",
        {"pre_classifier", "classifier"},
    ),
    "deberta-v2": (
        hf.DebertaV2Config(
            **SMALL,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            position_buckets=8,
            norm_rel_ebd="layer_norm",
        ),
        hf.DebertaV2ForSequenceClassification,
        "deberta.encoder.layer",
        {"pooler.dense", "classifier"},
    ),
    "gpt2": (
        hf.GPT2Config(
            n_embd=16,
            n_head=2,
            n_layer=3,
            vocab_size=60,
            bos_token_id=0,
            eos_token_id=0,
        ),
        hf.GPT2ForSequenceClassification,
        "transformer.h",
        {"transformer.ln_f", "score"},
    ),
    "llama": (
        hf.LlamaConfig(**SMALL, num_key_value_heads=1),
        hf.LlamaForSequenceClassification,
        "model.layers",
        {"model.norm", "score"},
    ),
    "vit": (
        hf.ViTConfig(
            **{k: v for k, v in SMALL.items() if k != "vocab_size"},
            image_size=32,
            patch_size=16,
        ),
        hf.ViTForImageClassification,
        None,
        {"vit.layernorm", "classifier"},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_partition_of_a_hugging_face_model(family):
    config, classifier, stack, head_modules = FAMILIES[family]
    names = [name for name, _ in classifier(config).named_parameters()]

    partition = partition_parameters(names)

    assert partition.num_blocks == 3
    for index, block in enumerate(partition.blocks):
        if stack is not None:
            assert all(name.startswith(f"{stack}.{index}.") for name in block)
        assert len(block) == len(partition.blocks[0])
    assert {name.rsplit(".", 1)[0] for name in partition.head} == head_modules
    divided = [*partition.trainable, *partition.frozen]
    assert sorted(divided) == sorted(names)
    assert any("embed" in name or "wte" in name for name in partition.frozen)


def test_depth_counts_from_the_output():
    partition = partition_parameters(["e", "l.0.w", "l.1.w", "l.2.w", "head"])
    assert [partition.depth(index) for index in range(3)] == [3, 2, 1]
    assert partition.update_names(2) == ("l.2.w", "head")


def test_merged_partition_is_the_whole_stack():
    merged = partition_parameters(["e", "l.0.w", "l.1.w", "head"]).merged()
    assert merged.blocks == (("l.0.w", "l.1.w"),)
    assert (merged.head, merged.frozen) == (("head",), ("e",))


def test_numbers_inside_a_layer_stay_inside_it():
    names = [f"net.{i}.experts.{e}.w" for i in range(2) for e in range(5)]
    assert partition_parameters(names).num_blocks == 2


def test_layers_that_share_their_parameters_are_one_block():
    config = hf.AlbertConfig(**SMALL)
    names = [
        n for n, _ in hf.AlbertForSequenceClassification(config).named_parameters()
    ]
    with pytest.raises(
        BlocksNotFound, match="No stack of at least two equal layers"
    ) as refusal:
        partition_parameters(names)
    # What is advised can be followed.
    advised = refusal.value.blocks
    assert f"blocks='{advised}'" in str(refusal.value)
    partition = partition_parameters(names, blocks=advised)
    assert partition.num_blocks == 1
    assert modules_of(partition.head) == {"albert.pooler", "classifier"}


def test_equal_stacks_are_not_guessed_between():
    config = hf.T5Config(d_model=16, d_ff=32, d_kv=8, num_heads=2, num_layers=2)
    names = [n for n, _ in hf.T5ForConditionalGeneration(config).named_parameters()]
    with pytest.raises(BlocksNotFound, match=r"encoder\.block, decoder\.block"):
        partition_parameters(names)
    chosen = partition_parameters(names, stack="decoder.block")
    assert chosen.num_blocks == 2
    assert all("relative_attention_bias" not in name for name in chosen.trainable)


@pytest.mark.parametrize(
    ("names", "stack", "message"),
    [
        ([], None, "no parameters at all"),
        (["l.0.w", "l.2.w"], None, r"numbered \[0, 2\]; expected 0 to 1"),
        (["l.0.w", "l.1.w"], "m", "the stacks found are: l"),
    ],
)
def test_errors_name_what_was_not_understood(names, stack, message):
    with pytest.raises(BlocksNotFound, match=message):
        partition_parameters(names, stack=stack)


# --- against the truth: what runs when, and full back-propagation ---------------------


@dataclass(frozen=True)
class Case:
    """A model, how it is divided, and what should come out."""

    make: Callable[[], nn.Module]
    num_blocks: int
    # Modules of the head, by the part of their name behind the common prefix.
    head: set[str]
    by_hand: dict[str, Any] = field(default_factory=dict)
    # Modules that run only after the last block, and yet stay frozen.
    frozen_behind: str = "nothing"
    batch: str = "text"


VISION = {
    **{k: v for k, v in SMALL.items() if k != "vocab_size"},
    "image_size": 32,
    "patch_size": 16,
}
DECODER = {**SMALL, "num_key_value_heads": 1, "pad_token_id": 0}
GPT2 = {"n_embd": 16, "n_head": 2, "n_layer": 3, "vocab_size": 60, "pad_token_id": 0}
T5 = {
    "d_model": 16,
    "d_ff": 32,
    "d_kv": 8,
    "num_heads": 2,
    "num_layers": 3,
    "vocab_size": 60,
    "decoder_start_token_id": 0,
    "eos_token_id": 1,
}
SWIN = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [2, 2, 4],
    "num_heads": [2, 2, 2],
    "window_size": 4,
}
RESNET = {
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 16],
    "depths": [2, 3, 2],
    "layer_type": "basic",
}


class Residual(nn.Module):
    def __init__(self, width_in, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        if width_in != width:
            self.downsample = nn.Sequential(
                nn.Conv2d(width_in, width, 1, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x):
        shortcut = self.downsample(x) if hasattr(self, "downsample") else x
        return torch.relu(shortcut + self.bn1(self.conv1(x)))


class TorchvisionResNet(nn.Module):
    """The names of torchvision's ResNets: conv1, bn1, layer1, ..., layer4, fc."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 7, stride=4, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        widths = [8, 8, 12, 16, 20]
        for stage in range(1, 5):
            before, width = widths[stage - 1 : stage + 1]
            layers = nn.Sequential(Residual(before, width), Residual(width, width))
            self.add_module(f"layer{stage}", layers)
        self.fc = nn.Linear(20, 2)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        for stage in range(1, 5):
            x = self.get_submodule(f"layer{stage}")(x)
        return self.fc(x.mean((2, 3)))


class RegisteredLate(nn.Module):
    """Registers its modules in another order than it runs them."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 2)
        self.late = nn.Linear(4, 4)
        self.early = nn.Linear(6, 4)

    def forward(self, x):
        return self.fc(torch.tanh(self.late(torch.tanh(self.early(x)))))


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


def perceptron():
    return nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)
    )


def equal_sequential():
    return nn.Sequential(Mlp(6), Mlp(6), Mlp(6))


def norms():
    return nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2))


def mixed_sequential():
    return nn.Sequential(nn.Linear(6, 4), Mlp(4), nn.Dropout(0.0), Mlp(4), norms())


DEBERTA = {
    **SMALL,
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 8,
    "norm_rel_ebd": "layer_norm",
}
NORM_AND_SCORE = {"model.norm", "score"}

CASES = {
    **{
        family: Case(lambda f=family: FAMILIES[f][1](FAMILIES[f][0]), 3, head)
        for family, head in {
            "roberta": {"classifier.dense", "classifier.out_proj"},
            "bert": {"bert.pooler.dense", "classifier"},
            "distilbert": {"pre_classifier", "classifier"},
            "deberta-v2": {"pooler.dense", "classifier"},
        }.items()
    },
    # Its convolution runs between the first and the second layer: nobody trains it.
    "deberta-v2 with convolution": Case(
        lambda: hf.DebertaV2ForSequenceClassification(
            hf.DebertaV2Config(**DEBERTA, conv_kernel_size=3)
        ),
        3,
        {"pooler.dense", "classifier"},
    ),
    "electra": Case(
        lambda: hf.ElectraForSequenceClassification(
            hf.ElectraConfig(**SMALL, embedding_size=8)
        ),
        3,
        {"classifier.dense", "classifier.out_proj"},
    ),
    "gpt2": Case(
        lambda: hf.GPT2ForSequenceClassification(hf.GPT2Config(**GPT2)),
        3,
        {"transformer.ln_f", "score"},
    ),
    # Its output layer is its input embedding, which runs before the blocks, too.
    "gpt2 language model": Case(
        lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)),
        3,
        {"transformer.ln_f"},
        batch="sequence",
    ),
    "llama": Case(
        lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**DECODER)),
        3,
        NORM_AND_SCORE,
    ),
    "qwen2": Case(
        lambda: hf.Qwen2ForSequenceClassification(hf.Qwen2Config(**DECODER)),
        3,
        NORM_AND_SCORE,
    ),
    # Back-propagation to the encoder passes the decoder, which nobody trains.
    "t5 encoder": Case(
        lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)),
        3,
        {"encoder.final_layer_norm", "decoder.final_layer_norm"},
        {"stack": "encoder.block"},
        frozen_behind="decoder.block.",
        batch="sequence",
    ),
    "t5 decoder": Case(
        lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)),
        3,
        {"decoder.final_layer_norm"},
        {"stack": "decoder.block"},
        batch="sequence",
    ),
    "t5 encoder and decoder": Case(
        lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)),
        6,
        {"decoder.final_layer_norm"},
        {"blocks": r"(encoder|decoder)\.block\.\d+"},
        batch="sequence",
    ),
    "t5 classifier, decoder": Case(
        lambda: hf.T5ForSequenceClassification(hf.T5Config(**T5)),
        3,
        {
            "transformer.decoder.final_layer_norm",
            "classification_head.dense",
            "classification_head.out_proj",
        },
        {"stack": "transformer.decoder.block"},
        batch="sequence classification",
    ),
    "vit": Case(
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**VISION)),
        3,
        {"vit.layernorm", "classifier"},
        batch="images",
    ),
    "deit": Case(
        lambda: hf.DeiTForImageClassification(hf.DeiTConfig(**VISION)),
        3,
        {"deit.layernorm", "classifier"},
        batch="images",
    ),
    "swin by stages": Case(
        lambda: hf.SwinForImageClassification(hf.SwinConfig(**SWIN)),
        3,
        {"swin.layernorm", "classifier"},
        {"stack": "swin.encoder.layers"},
        batch="images",
    ),
    # The maps between the stages belong to no block.
    "swin by layers": Case(
        lambda: hf.SwinForImageClassification(hf.SwinConfig(**SWIN)),
        8,
        {"swin.layernorm", "classifier"},
        {"blocks": r"swin\.encoder\.layers\.\d+\.blocks\.\d+"},
        batch="images",
    ),
    "resnet by stages": Case(
        lambda: hf.ResNetForImageClassification(hf.ResNetConfig(**RESNET)),
        3,
        {"classifier.1"},
        {"stack": "resnet.encoder.stages"},
        batch="images",
    ),
    "resnet by layers": Case(
        lambda: hf.ResNetForImageClassification(hf.ResNetConfig(**RESNET)),
        7,
        {"classifier.1"},
        {"blocks": r"resnet\.encoder\.stages\.\d+\.layers\.\d+"},
        batch="images",
    ),
    "torchvision's resnet by stages": Case(
        TorchvisionResNet,
        4,
        {"fc"},
        {"blocks": ["conv1|bn1|layer1", "layer2", "layer3", "layer4"]},
        batch="tensor of images",
    ),
    "torchvision's resnet by layers": Case(
        TorchvisionResNet,
        8,
        {"fc"},
        {"blocks": r"layer\d\.\d+"},
        batch="tensor of images",
    ),
    "perceptron": Case(perceptron, 3, set(), {"blocks": r"\d+"}, batch="tensor"),
    "perceptron with head": Case(
        perceptron, 2, {"4"}, {"blocks": ["0", "2"]}, batch="tensor"
    ),
    "sequential of equal modules": Case(equal_sequential, 3, set(), batch="tensor"),
    "sequential of unlike modules": Case(
        mixed_sequential, 2, {"4.0", "4.1"}, {"blocks": ["1", "3"]}, batch="tensor"
    ),
}


def batch_of(kind):
    torch.manual_seed(1)
    ids = torch.randint(5, 60, (4, 7))
    ends = torch.cat([ids, torch.ones(4, 1, dtype=torch.long)], dim=1)
    labels = torch.tensor([0, 1, 1, 0])
    return {
        "text": {"input_ids": ids, "labels": labels},
        "sequence": {"input_ids": ids, "labels": ids},
        "sequence classification": {"input_ids": ends, "labels": labels},
        "images": {"pixel_values": torch.randn(4, 3, 32, 32), "labels": labels},
        "tensor of images": {"input": torch.randn(4, 3, 32, 32), "labels": labels},
        "tensor": {"input": torch.randn(4, 6), "labels": labels},
    }[kind]


def loss_of(model, batch):
    if "input" in batch:
        return nn.functional.cross_entropy(model(batch["input"]), batch["labels"])
    return model_loss(model, batch)


def built(case):
    torch.manual_seed(0)
    return case.make().eval(), batch_of(case.batch)


def module_of(name):
    return name.rpartition(".")[0]


def modules_of(names):
    return {module_of(name) for name in names}


def running_times(model, batch):
    """Trace one forward pass: module -> when it began to run, each time."""
    times = {}
    clock = iter(range(10**6))

    def note(module):
        return lambda *_: times.setdefault(module, []).append(next(clock))

    handles = [
        model.get_submodule(module).register_forward_pre_hook(note(module))
        for module in modules_of(name for name, _ in model.named_parameters())
    ]
    loss_of(model, batch)
    for handle in handles:
        handle.remove()
    return times


def check_against_trace(partition, times, frozen_behind="nothing"):
    trained = [
        [time for module in modules_of(names) for time in times[module]]
        for names in (*partition.blocks, partition.head)
        if names
    ]
    for earlier, later in pairwise(trained):
        assert max(earlier) < min(later)
    # Whatever runs only behind the last block is the head.
    last = max(time for name in partition.blocks[-1] for time in times[module_of(name)])
    behind = {module for module, seen in times.items() if min(seen) > last}
    frozen = behind - modules_of(partition.head)
    assert all(module.startswith(frozen_behind) for module in frozen)


@pytest.mark.parametrize("name", CASES)
def test_blocks_run_in_order_and_the_head_behind_them(name):
    case = CASES[name]
    model, batch = built(case)
    names = [n for n, _ in model.named_parameters()]

    partition = partition_parameters(names, **case.by_hand)

    assert partition.num_blocks == case.num_blocks
    assert modules_of(partition.head) == case.head
    assert sorted([*partition.trainable, *partition.frozen]) == sorted(names)
    times = running_times(model, batch)
    check_against_trace(partition, times, case.frozen_behind)


@pytest.mark.parametrize("name", CASES)
def test_every_blocks_gradient_is_that_of_full_back_propagation(name):
    case = CASES[name]
    model, batch = built(case)
    parameters = dict(model.named_parameters())
    partition = partition_parameters(parameters, **case.by_hand)
    full = torch.autograd.grad(
        loss_of(model, batch),
        list(parameters.values()),
        allow_unused=True,
        materialize_grads=True,
    )
    expected = dict(zip(parameters, full, strict=True))
    for index in range(partition.num_blocks):
        result = block_gradient(model, partition, index, batch, loss_function=loss_of)
        assert list(result.gradients) == list(partition.update_names(index))
        for parameter, gradient in result.gradients.items():
            torch.testing.assert_close(gradient, expected[parameter])
        assert any(expected[n].any() for n in partition.blocks[index])


def test_the_trace_sees_a_wrong_partition():
    # The check must be able to fail: here the order of the names misleads.
    model = RegisteredLate()
    names = [name for name, _ in model.named_parameters()]
    partition = partition_parameters(names, blocks="early|late")
    times = running_times(model, batch_of("tensor"))
    with pytest.raises(AssertionError):
        check_against_trace(partition, times)


def test_modules_registered_out_of_order_are_given_by_hand():
    model = RegisteredLate()
    names = [name for name, _ in model.named_parameters()]
    in_order = [n for n in names if "fc" not in n] + [n for n in names if "fc" in n]
    partition = partition_parameters(in_order, blocks=["early", "late"])
    assert partition.head == ("fc.weight", "fc.bias")
    check_against_trace(partition, running_times(model, batch_of("tensor")))


REFUSED = {
    "albert": (
        lambda: hf.AlbertForSequenceClassification(hf.AlbertConfig(**SMALL)),
        "share their parameters, as ALBERT's do",
    ),
    "t5": (
        lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)),
        r"2 stacks have 3 layers: encoder\.block, decoder\.block",
    ),
    "t5 with a short decoder": (
        lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5, num_decoder_layers=2)),
        r"Behind the layers of 'encoder\.block' stand those of 'decoder\.block'",
    ),
    "swin": (
        lambda: hf.SwinForImageClassification(hf.SwinConfig(**SWIN)),
        r"modules of 'swin\.encoder\.layers' are unlike each other",
    ),
    "resnet": (
        lambda: hf.ResNetForImageClassification(hf.ResNetConfig(**RESNET)),
        r"modules of 'resnet\.encoder\.stages' are unlike each other",
    ),
    "torchvision's resnet": (
        TorchvisionResNet,
        "Behind the layers of 'layer1' stand those of 'layer2'",
    ),
    "perceptron": (perceptron, r"numbered \[0, 2, 4\].* blocks='\\d\+'"),
    "sequential of unlike modules": (
        mixed_sequential,
        r"No stack of at least two .* modules of '' are unlike each other",
    ),
    # Two layers that feed each other are no stack beside others.
    "autoencoder": (
        lambda: nn.ModuleDict({"encoder": perceptron(), "decoder": perceptron()}),
        r"\(encoder, decoder\) are of plain modules, .* found_blocks\(model\)",
    ),
    # Its classifier's two layers are alike, but no stack to train by blocks.
    "torchvision's convnext": (
        lambda: nn.ModuleDict({"features": mixed_sequential(), "classifier": norms()}),
        "modules of 'features' are unlike each other",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_names_do_not_tell_is_refused(name):
    make, message = REFUSED[name]
    names = [name for name, _ in make().named_parameters()]
    with pytest.raises(BlocksNotFound, match=message) as refusal:
        partition_parameters(names)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["vit", "resnet by stages"])
def test_a_state_dict_gives_the_blocks_of_the_model(name):
    case = CASES[name]
    model = case.make()
    of_model = partition_parameters(
        (n for n, _ in model.named_parameters()), **case.by_hand
    )
    of_state = partition_parameters(model.state_dict(), **case.by_hand)
    assert of_state.trainable == of_model.trainable


def test_the_order_of_a_safetensors_file_is_refused():
    # The alphabet puts "classifier" in front of "roberta": it would count as frozen.
    names = [n for n, _ in CASES["roberta"].make().named_parameters()]
    with pytest.raises(BlocksNotFound, match="alphabetical order"):
        partition_parameters(sorted(names))
    with pytest.raises(BlocksNotFound, match=r"numbered \[0, 1, 10, 2, 3"):
        partition_parameters(sorted(f"layers.{index}.w" for index in range(11)))


@pytest.mark.parametrize(
    ("by_hand", "message"),
    [
        ({"blocks": ["l.0", "k"]}, "'k' matches the beginning of no parameter name"),
        ({"blocks": "(l"}, "'\\(l' is not a regular expression"),
        ({"blocks": []}, "blocks is empty"),
        ({"blocks": ["l", r"l\.1"]}, r"l\.1\.w belongs to more than one block"),
        ({"blocks": "l", "stack": "l"}, "not both"),
    ],
)
def test_errors_name_the_block_that_was_not_understood(by_hand, message):
    with pytest.raises(BlocksNotFound, match=message):
        partition_parameters(["l.0.w", "l.1.w", "l.10.w", "head.w"], **by_hand)


@pytest.mark.parametrize("block", ["l.1", "l.1.", r"l\.1", r"l\.1\."])
def test_a_block_ends_at_a_dot(block):
    partition = partition_parameters(["l.1.w", "l.10.w"], blocks=[block])
    assert partition.blocks == (("l.1.w",),)


def test_a_model_inside_a_sequential_is_found():
    # As sentence-transformers wrap it: transformer, pooling, dense layer.
    layers = [f"0.auto_model.encoder.layer.{index}.dense.w" for index in range(3)]
    partition = partition_parameters([*layers, "0.auto_model.pooler.w", "2.linear.w"])
    assert partition.blocks == tuple((name,) for name in layers)
    assert partition.head == ("0.auto_model.pooler.w", "2.linear.w")


def test_a_head_of_numbered_modules_stays_a_head():
    names = ["l.0.a.w", "l.1.a.w", "classifier.0.w", "classifier.2.w"]
    assert partition_parameters(names).head == ("classifier.0.w", "classifier.2.w")


def test_equal_layers_go_before_those_that_differ_in_a_norm():
    convolutions = [f"front.{n}.conv.weight" for n in range(7)]
    convolutions.insert(1, "front.0.layer_norm.weight")
    layers = [f"layers.{n}.{part}.weight" for n in range(2) for part in ("up", "norm")]
    found = partition_parameters([*convolutions, *layers, "head.weight"])
    assert [*found.blocks[0]] == layers[:2]
    alone = partition_parameters([*convolutions, "head.weight"])
    assert alone.num_blocks == 7
