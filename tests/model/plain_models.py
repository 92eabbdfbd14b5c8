"""Models as projects write them, without a library's layout."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from tests.model.block_cases import Residual


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


def made(case):
    torch.manual_seed(0)
    return case.make()
