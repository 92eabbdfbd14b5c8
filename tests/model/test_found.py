"""Blocks found in models of any kind, and inputs found for them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from lola_flwr.build import coordinator_for_weights
from lola_flwr.costs.of_model import model_costs
from lola_flwr.errors import UserError
from lola_flwr.model.adapter_blocks import model_partition
from lola_flwr.model.blocks import BlocksNotFound
from lola_flwr.model.found import found_blocks, spelled_blocks
from lola_flwr.model.plain_input import plain_input
from tests.marks import rest_slow
from tests.model.test_blocks import (
    Mlp,
    RegisteredLate,
    Residual,
    TorchvisionResNet,
    mixed_sequential,
    perceptron,
)


def sequence(names, modules):
    """Return a module whose children of these names run one after the other."""
    made = nn.Sequential()
    for name, module in zip(names.split(), modules, strict=True):
        made.add_module(name, module)
    return made


class Quickstart(nn.Module):
    """The network of Flower's own quickstart."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x):
        x = self.pool(functional.relu(self.conv1(x)))
        x = self.pool(functional.relu(self.conv2(x)))
        x = x.view(-1, 16 * 5 * 5)
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x)))))


class VisionTransformer(nn.Module):
    """The names of torchvision's: encoder.layers.encoder_layer_0, ..."""

    def __init__(self):
        super().__init__()
        self.class_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.conv_proj = nn.Conv2d(3, 8, 16, 16)
        self.encoder = nn.Module()
        self.encoder.pos_embedding = nn.Parameter(torch.zeros(1, 5, 8))
        names = " ".join(f"encoder_layer_{index}" for index in range(3))
        layers = (nn.TransformerEncoderLayer(8, 2, 16) for _ in range(3))
        self.encoder.layers = sequence(names, layers)
        self.encoder.ln = nn.LayerNorm(8)
        self.heads = sequence("head", [nn.Linear(8, 2)])

    def forward(self, x):
        assert x.shape[2:] == (32, 32), "wrong image size"
        tokens = self.conv_proj(x).flatten(2).mT
        token = self.class_token.expand(len(x), -1, -1)
        x = torch.cat([token, tokens], 1) + self.encoder.pos_embedding
        return self.heads(self.encoder.ln(self.encoder.layers(x))[:, 0])


class WideResNet(nn.Module):
    """conv1, block1 to block3, bn1, fc."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 2)
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        widths = [4, 4, 6, 8]
        for stage in range(1, 4):
            before, width = widths[stage - 1 : stage + 1]
            blocks = nn.Sequential(Residual(before, width), Residual(width, width))
            self.add_module(f"block{stage}", blocks)
        self.bn1 = nn.BatchNorm2d(8)

    def forward(self, x):
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(torch.relu(self.bn1(x)).mean((2, 3)))


def dense_net():
    features = sequence(
        "conv0 norm0 denseblock1 transition1 denseblock2 norm5",
        [
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4),
            sequence("denselayer1 denselayer2", [Residual(4, 4), Residual(4, 4)]),
            sequence("norm conv", [nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1)]),
            sequence("denselayer1 denselayer2", [Residual(6, 6), Residual(6, 6)]),
            nn.BatchNorm2d(6),
        ],
    )
    tail = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2)]
    return sequence("features pool flat classifier", [features, *tail])


def efficient_net():
    def stage(before, width):
        return nn.Sequential(Residual(before, width), Residual(width, width))

    def stem(before, width):
        return nn.Sequential(nn.Conv2d(before, width, 1), nn.BatchNorm2d(width))

    features = nn.Sequential(stem(3, 4), stage(4, 4), stage(4, 6), stem(6, 8))
    classifier = nn.Sequential(nn.Dropout(), nn.Linear(8, 2))
    tail = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), classifier]
    return sequence("features pool flat classifier", [features, *tail])


def vgg():
    """Plain layers with norms, in two lists, for images of 28 by 28 only."""
    features = nn.Sequential(
        *[nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)],
        *[nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)],
    )
    classifier = nn.Sequential(
        nn.Flatten(), nn.Linear(150, 8), nn.ReLU(), nn.Linear(8, 2)
    )
    return sequence("features classifier", [features, classifier])


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(9, 6), nn.ReLU(), nn.Linear(6, 3))
        self.decoder = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 9))

    def forward(self, x):
        return self.decoder(self.encoder(x))


class HalfAutoencoder(Autoencoder):
    """As in Lightning's first example: forward is for inference."""

    def forward(self, x):
        return self.encoder(x)


class TextCnn(nn.Module):
    """Convolutions beside each other, and a scale of its own."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 6)
        self.convs = nn.ModuleList(nn.Conv1d(6, 4, width) for width in (2, 3))
        self.scale = nn.Parameter(torch.ones(8))
        self.fc = nn.Linear(8, 3)
        self.temperature = nn.Parameter(torch.ones(1))

    def forward(self, ids):
        x = self.embedding(ids).mT
        x = torch.cat([conv(x).amax(-1) for conv in self.convs], 1)
        return self.fc(x * self.scale) / self.temperature


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(5, 6, num_layers=2, batch_first=True)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.fc = nn.Linear(6, 2)

    def forward(self, x):
        x, _ = self.lstm(x)
        x, _ = self.attention(x, x, x)
        return self.fc(x[:, -1])


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left1, self.left2 = nn.Linear(3, 4), nn.Linear(4, 4)
        self.right = nn.Linear(2, 4)
        self.fc1, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, left, right):
        x = self.left2(torch.relu(self.left1(left))) + self.right(right)
        return self.fc2(torch.relu(self.fc1(x)))


class ActorCritic(nn.Module):
    """Two heads beside each other."""

    def __init__(self, give=tuple):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6))
        self.policy, self.value = nn.Linear(6, 2), nn.Linear(6, 1)
        self.give = give

    def forward(self, x):
        x = self.body(x)
        return self.give((self.policy(x), self.value(x)))


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


def made(case):
    torch.manual_seed(0)
    return case.make()


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


def flattened(side, pool, channels=1):
    """Return a network that flattens images of that side, rounded down."""
    width = channels * (side // pool) ** 2
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1),
        *[nn.MaxPool2d(pool), nn.Flatten(), nn.Linear(width, 2)],
    )


@pytest.mark.parametrize(
    ("side", "pool", "known"),
    rest_slow(
        [
            (32, 1, 32),
            (28, 2, 28),  # 28 and 29 fit
            (50, 1, 50),  # no usual size, but one alone
            (50, 2, None),  # 50 and 51 fit, neither of them usual
            (32, 16, None),  # up to 47
            (48, 48, None),  # 64 and 84, too
        ],
        fast=2,
    ),
)
def test_sizes_are_found_where_one_fits(side, pool, known):
    found = plain_input(flattened(side, pool))
    assert found.known == (known is not None)
    assert found.example.shape[2:] == (side, side)


@pytest.mark.slow
def test_lengths_are_found_where_one_fits():
    def net(pool, width):
        return nn.Sequential(
            nn.Conv1d(3, 2, 5), nn.MaxPool1d(pool), nn.Flatten(), nn.Linear(width, 2)
        )

    found = plain_input(net(1, 2 * 46))
    assert (found.known, tuple(found.example.shape)) == (True, (1, 3, 50))
    assert not plain_input(net(2, 2 * 23)).known


def test_tokens_are_known_where_they_are_told():
    partition, example = found_blocks(TextCnn(), sequence_length=12)
    assert tuple(example.shape) == (1, 12)
    assert partition == found_blocks(TextCnn(), torch.zeros(2, 9, dtype=torch.long))[0]


def test_all_that_a_model_returns_is_counted():
    def flops(give):
        model = ActorCritic(give)
        partition, example = found_blocks(model)
        return model_costs(model, partition, batch_size=8, example=example).flops

    np.testing.assert_array_equal(flops(tuple), flops(lambda t: {"a": t[0], "b": t[1]}))
    # Of the value: its weight's gradient, and its input's.
    one = flops(lambda outputs: outputs[0])
    np.testing.assert_array_equal(flops(tuple) - one, 2 * 2 * 8 * 6)


def test_inputs_are_of_the_weights_type():
    for dtype in (torch.float64, torch.float16):
        _, example = found_blocks(perceptron().to(dtype))
        assert example.dtype == dtype


def test_trying_leaves_the_model_as_it_is():
    model = sequence("a b", [Quickstart(), nn.Linear(10, 10)])
    model.again = model.b  # one module under two names
    model.b.eval()
    before = {
        name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()
    }
    plain_input(model)
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert id(tensor) == before[name][0]
        assert tensor.equal(before[name][1])
    assert model.a.training
    assert not model.b.training
