"""Blocks found in models of any kind."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from lola_flwr.build import coordinator_for_weights
from lola_flwr.costs.of_model import model_costs
from lola_flwr.errors import UserError
from lola_flwr.model.adapter_blocks import model_partition
from lola_flwr.model.blocks import BlocksNotFound
from lola_flwr.model.found import found_blocks, spelled_blocks
from tests.marks import rest_slow
from tests.model.block_cases import (
    Mlp,
    RegisteredLate,
    TorchvisionResNet,
    mixed_sequential,
    perceptron,
)
from tests.model.plain_models import (
    ActorCritic,
    Autoencoder,
    HalfAutoencoder,
    Quickstart,
    Recurrent,
    TextCnn,
    TwoInputs,
    VisionTransformer,
    WideResNet,
    dense_net,
    efficient_net,
    made,
    vgg,
)


@dataclass(frozen=True)
class Case:
    """A model, what is found in it, and what it reads if that is to be told."""

    make: Callable[[], nn.Module]
    blocks: list[str]
    head: str
    shape: tuple[int, ...] | None = None
    example: object = None


TWO = {"left": torch.zeros(1, 3), "right": torch.zeros(1, 2)}
CASES = {
    "quickstart": Case(
        Quickstart, ["conv1", "conv2", "fc1", "fc2"], "fc3", (1, 3, 32, 32)
    ),
    "perceptron": Case(perceptron, ["0", "2"], "4", (1, 6)),
    "table": Case(
        lambda: nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 4), nn.Linear(4, 2)),
        ["0|1"],
        "2",
        (1, 5),
    ),
    "regression": Case(lambda: nn.Linear(4, 1), ["weight|bias"], "", (1, 4)),
    "registered late": Case(RegisteredLate, ["early", "late"], "fc", (1, 6)),
    "sequential": Case(mixed_sequential, ["0|1", "3"], r"4\.0|4\.1", (1, 6)),
    "equal layers": Case(lambda: nn.Sequential(Mlp(6), Mlp(6)), ["0", "1"], "", (1, 6)),
    "actor and critic": Case(
        ActorCritic, [r"body\.0", r"body\.2"], "policy|value", (1, 4)
    ),
    "vgg": Case(
        vgg,
        [r"features\.0|features\.1", r"features\.4|features\.5", r"classifier\.1"],
        r"classifier\.3",
        (1, 1, 28, 28),
    ),
    "autoencoder": Case(
        Autoencoder,
        [r"encoder\.0", r"encoder\.2", r"decoder\.0"],
        r"decoder\.2",
        (1, 9),
    ),
    "half an autoencoder": Case(
        HalfAutoencoder, [r"encoder\.0|decoder"], r"encoder\.2", (1, 9)
    ),
    "vision transformer": Case(
        VisionTransformer,
        [
            r"class_token|conv_proj|encoder\.pos_embedding|"
            r"encoder\.layers\.encoder_layer_0",
            r"encoder\.layers\.encoder_layer_1",
            r"encoder\.layers\.encoder_layer_2",
        ],
        r"encoder\.ln|heads",
        (1, 3, 32, 32),
    ),
    "resnet": Case(
        TorchvisionResNet,
        ["conv1|bn1|layer1", "layer2", "layer3", "layer4"],
        "fc",
        example=torch.zeros(1, 3, 224, 224),
    ),
    "wide resnet": Case(
        WideResNet,
        ["conv1|block1", "block2", "block3"],
        "fc|bn1",
        example=torch.zeros(1, 3, 224, 224),
    ),
    "densenet": Case(
        dense_net,
        [
            r"features\.conv0|features\.norm0|features\.denseblock1",
            r"features\.transition1|features\.denseblock2",
        ],
        r"features\.norm5|classifier",
        example=torch.zeros(1, 1, 224, 224),
    ),
    "efficientnet": Case(
        efficient_net,
        [r"features\.0", r"features\.1", r"features\.2", r"features\.3"],
        "classifier",
        example=torch.zeros(1, 3, 224, 224),
    ),
    "text cnn": Case(
        TextCnn,
        ["embedding", "convs"],
        "scale|fc|temperature",
        example=torch.zeros(1, 128, dtype=torch.long),
    ),
    "recurrent": Case(
        Recurrent, ["lstm", "attention"], "fc", example=torch.zeros(1, 128, 5)
    ),
    "two inputs": Case(TwoInputs, ["left1|left2|right", "fc1"], "fc2", example=TWO),
}


def division(model, patterns):
    """Return the names that each regular expression matches, as sets."""
    names = [name for name, _ in model.named_parameters()]
    return [
        {name for name in names if re.match(rf"(?:{p})(\.|$)", name)} for p in patterns
    ]


SLOWER = ("vision transformer", "vgg", "densenet", "efficientnet", "resnet")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in SLOWER else name
        for name in CASES
    ],
)
def test_blocks_and_head_are_all_that_wants_gradients(name):
    case = CASES[name]
    model = made(case)
    partition, example = found_blocks(model, case.example)
    *blocks, head = division(model, [*case.blocks, case.head or "nothing"])
    assert [*map(set, partition.blocks)] == blocks
    assert set(partition.head) == head
    every = [name for name, _ in model.named_parameters()]
    assert sorted(partition.trainable) == sorted(every)
    assert partition.frozen == ()
    assert eval(spelled_blocks(model, partition)) == case.blocks
    if case.shape is not None:
        assert tuple(example.shape) == case.shape
    # What is written finds the same again, on the same example.
    again = model_partition(model, blocks=case.blocks, example=example)
    assert [*map(set, again.blocks)] == blocks
    assert set(again.head) == head


@pytest.mark.parametrize("name", rest_slow(CASES))
def test_what_is_frozen_is_in_no_block(name):
    case = CASES[name]
    for seed in range(3):
        model = made(case)
        names = [name for name, _ in model.named_parameters()]
        rng = np.random.default_rng(seed)
        frozen = {n for n in names if rng.random() < (0.3, 0.6, 0.9)[seed]}
        for frozen_name in frozen:
            model.get_parameter(frozen_name).requires_grad_(False)
        if frozen == set(names):
            with pytest.raises(BlocksNotFound, match="All parameters"):
                found_blocks(model, case.example)
            continue
        partition, _ = found_blocks(model, case.example)
        assert all(partition.blocks)
        assert sorted([*partition.trainable, *partition.frozen]) == sorted(names)
        assert set(partition.frozen) == frozen


UNKNOWN = [
    name for name, case in CASES.items() if isinstance(case.example, torch.Tensor)
]


@pytest.mark.parametrize(
    "name",
    rest_slow(["wide resnet", *(c for c in CASES if c != "wide resnet")], fast=2),
)
def test_a_coordinator_needs_nothing_or_one_line(name):
    case = CASES[name]
    model = made(case)
    options = {"batch_size": 8}
    if case.shape is None:
        with pytest.raises(UserError, match="pass ") as refusal:
            coordinator_for_weights(model, **options)
        said = str(refusal.value)
        assert "\n" not in said
        if name in UNKNOWN:
            # The line is pasted.
            line = re.search(r"pass (blocks=.*, example=torch\.zeros\(.*?\))", said)[1]
            pasted = eval(f"dict({line})", {"torch": torch})
            assert pasted["blocks"] == case.blocks
            assert pasted["example"].equal(case.example)
            options |= pasted
            if name == "recurrent":
                options["example"] = torch.zeros(1, 4, 5)  # the size of its own
        else:
            assert 'example={"left": ..., "right": ...}, its input' in said
            options["example"] = case.example
    # What oneDNN takes for a recurrent layer is not known.
    with torch.backends.mkldnn.flags(enabled=name != "recurrent"):
        coordinator = coordinator_for_weights(model, **options)
        check_costs(coordinator, model, options.get("example"))


def check_costs(coordinator, model, example):
    partition, example = found_blocks(model, example)
    assert [*map(set, coordinator.partition.blocks)] == [*map(set, partition.blocks)]
    assert set(coordinator.partition.head) == set(partition.head)
    costs = coordinator._planner.costs
    counted = model_costs(model, partition, batch_size=8, example=example)
    np.testing.assert_array_equal(costs.flops, counted.flops)
    np.testing.assert_array_equal(costs.memory_bytes, counted.memory_bytes)
    np.testing.assert_array_equal(costs.payload_bits, counted.payload_bits)


def test_what_forward_does_not_use_is_told(caplog):
    found_blocks(Autoencoder())
    assert not caplog.records
    model = HalfAutoencoder()
    model.decoder[0].requires_grad_(False)
    found_blocks(model)
    (record,) = caplog.records
    said = record.getMessage()
    assert "HalfAutoencoder.forward does not use decoder.2.weight, " in said
    assert "decoder.0" not in said
