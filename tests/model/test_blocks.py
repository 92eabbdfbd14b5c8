"""Blocks by the names of parameters, and which names tell none."""

from __future__ import annotations

import pytest
import transformers as hf
from torch import nn

from lola_flwr.model.blocks import BlocksNotFound, partition_parameters
from tests.conftest import SMALL
from tests.model.block_cases import (
    FAMILIES,
    RESNET,
    SWIN,
    T5,
    TorchvisionResNet,
    mixed_sequential,
    modules_of,
    norms,
    perceptron,
)


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
