"""Model, data and training."""

import torch
import torch.nn.functional as F
from generated import table
from torch import nn


class IncomeClassifier(nn.Module):
    """A multilayer perceptron."""

    def __init__(self, input_dim=12):
        super().__init__()
        self.layer1 = nn.Linear(input_dim, 64)
        self.layer2 = nn.Linear(64, 32)
        self.output = nn.Linear(32, 4)
        self.dropout = nn.Dropout(0.1)
        self.relu = nn.ReLU()

    def forward(self, x):
        x = self.dropout(self.relu(self.layer1(x)))
        x = self.relu(self.layer2(x))
        return self.output(x)


def get_weights(net):
    """Return the model's arrays."""
    return [val.cpu().numpy() for val in net.state_dict().values()]


def set_weights(net, parameters):
    """Load the model's arrays."""
    names = net.state_dict().keys()
    state = {k: torch.tensor(v) for k, v in zip(names, parameters, strict=True)}
    net.load_state_dict(state, strict=True)


def load_data(partition_id, count=192):
    """Load the rows of a node."""
    return torch.utils.data.TensorDataset(*table(partition_id, count))


def train(model, dataset, epochs, lr):
    """Train the model; return the last loss."""
    loader = torch.utils.data.DataLoader(dataset, batch_size=16, shuffle=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    model.train()
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
    return loss.item()


def evaluate(model, dataset):
    """Return loss and accuracy."""
    x, y = dataset.tensors
    model.eval()
    with torch.no_grad():
        logits = model(x)
    return F.cross_entropy(logits, y).item(), (
        logits.argmax(1) == y
    ).float().mean().item()
