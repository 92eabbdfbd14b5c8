"""Model, data and training."""

import torch
import torch.nn.functional as F
from generated import images
from torch import nn


class Net(nn.Module):
    """A body, whose weights a checkpoint would give, and a new classifier."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.body = nn.Sequential(
                nn.Conv2d(3, 16, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(16, 64, 3, stride=2, padding=1),
                nn.ReLU(),
                nn.AdaptiveAvgPool2d(4),
                nn.Flatten(),
            )
        self.body.requires_grad_(False)
        self.fc = nn.Linear(1024, 10)

    def forward(self, x):
        return self.fc(self.body(x))


def load_data(partition_id, count=192):
    """Load the part of a node."""
    return torch.utils.data.TensorDataset(*images(partition_id, count))


def train(net, dataset, epochs, lr):
    """Train the classifier; return the mean loss."""
    loader = torch.utils.data.DataLoader(dataset, batch_size=16, shuffle=True)
    wanted = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(wanted, lr=lr, momentum=0.9)
    net.train()
    losses = []
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return sum(losses) / len(losses)


def test(net, dataset):
    """Return loss and accuracy."""
    x, y = dataset.tensors
    net.eval()
    with torch.no_grad():
        logits = net(x)
    return F.cross_entropy(logits, y).item(), (
        logits.argmax(1) == y
    ).float().mean().item()
