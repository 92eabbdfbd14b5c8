"""A small model, generated data, and its training."""

import torch
from torch import nn


class Layer(nn.Module):
    """One residual layer."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.linear = nn.Linear(16, 16)

    def forward(self, x):
        return x + torch.relu(self.linear(self.norm(x)))


class Net(nn.Module):
    """Three layers between an embedding and a classifier."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.head = nn.Linear(16, 2)

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def load_data(part):
    """Points in 8 dimensions; the label is whether two of them have the same sign."""
    generator = torch.Generator().manual_seed(part)
    x = torch.randn(192, 8, generator=generator)
    return x, (x[:, 0] * x[:, 1] > 0).long()


def train(net, data, epochs, lr):
    """Train on batches of 16; return the mean loss."""
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    losses = []
    net.train()
    for _ in range(epochs):
        for x, y in zip(*(part.split(16) for part in data), strict=True):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return sum(losses) / len(losses)


def test(net, data):
    """Return loss and accuracy."""
    x, y = data
    net.eval()
    with torch.no_grad():
        logits = net(x)
    loss = nn.functional.cross_entropy(logits, y).item()
    return loss, (logits.argmax(1) == y).float().mean().item()
