"""Model, data and training."""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from generated import images
from torch import nn


class BasicBlock(nn.Module):
    """Two convolutions, each behind its norm, and a way around them."""

    def __init__(self, in_planes, out_planes, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, out_planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_planes)
        self.conv2 = nn.Conv2d(out_planes, out_planes, 3, 1, 1, bias=False)
        self.shortcut = None
        if in_planes != out_planes:
            self.shortcut = nn.Conv2d(in_planes, out_planes, 1, stride, bias=False)

    def forward(self, x):
        y = F.relu(self.bn1(x))
        around = x if self.shortcut is None else self.shortcut(y)
        y = self.conv1(y)
        return around + self.conv2(F.relu(self.bn2(y)))


class NetworkBlock(nn.Module):
    """A stage."""

    def __init__(self, nb_layers, in_planes, out_planes, stride):
        super().__init__()
        blocks = [BasicBlock(in_planes, out_planes, stride)]
        blocks += [BasicBlock(out_planes, out_planes, 1) for _ in range(nb_layers - 1)]
        self.layer = nn.Sequential(*blocks)

    def forward(self, x):
        return self.layer(x)


class WideResNet(nn.Module):
    """WideResNet-10-1 with few channels."""

    def __init__(self, num_classes=10, width=1):
        super().__init__()
        channels = [8, 8 * width, 16 * width, 32 * width]
        self.conv1 = nn.Conv2d(3, channels[0], 3, 1, 1, bias=False)
        self.block1 = NetworkBlock(1, channels[0], channels[1], 1)
        self.block2 = NetworkBlock(1, channels[1], channels[2], 2)
        self.block3 = NetworkBlock(1, channels[2], channels[3], 2)
        self.bn1 = nn.BatchNorm2d(channels[3])
        self.fc = nn.Linear(channels[3], num_classes)

    def forward(self, x):
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        x = F.relu(self.bn1(x)).mean((2, 3))
        return self.fc(x)


def get_weights(net):
    """Return the model's arrays."""
    return [val.cpu().numpy() for _, val in net.state_dict().items()]


def set_weights(net, parameters):
    """Load the model's arrays."""
    params_dict = zip(net.state_dict().keys(), parameters, strict=True)
    net.load_state_dict(OrderedDict({k: torch.tensor(v) for k, v in params_dict}))


def load_data(partition_id, count=192):
    """Return the batches of a node."""
    x, y = images(partition_id, count, noise=2.2)
    return list(zip(x.split(32), y.split(32), strict=True))


def train(net, batches, epochs, lr):
    """Train the model; return the mean loss."""
    optimizer = torch.optim.SGD(net.parameters(), lr, momentum=0.9, weight_decay=5e-4)
    net.train()
    losses = []
    for _ in range(epochs):
        for x, y in batches:
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return sum(losses) / len(losses)


def test(net, batches):
    """Return loss and accuracy."""
    net.eval()
    loss, correct, examples = 0.0, 0, 0
    with torch.no_grad():
        for x, y in batches:
            logits = net(x)
            loss += F.cross_entropy(logits, y).item()
            correct += (logits.argmax(1) == y).sum().item()
            examples += len(y)
    return loss / len(batches), correct / examples
