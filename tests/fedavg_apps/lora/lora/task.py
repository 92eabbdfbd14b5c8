"""Data and training."""

import torch
from generated import text


def load_data(partition_id, count=96):
    """Return the batches of a node."""
    return text(partition_id, count).split(16)


def train(model, batches, epochs, lr):
    """Train what wants gradients; return the mean loss."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    model.train()
    losses = []
    for _ in range(epochs):
        for ids in batches:
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return sum(losses) / len(losses)


def test(model, batches):
    """Return the mean loss."""
    model.eval()
    with torch.no_grad():
        losses = [model(input_ids=ids, labels=ids).loss.item() for ids in batches]
    return sum(losses) / len(losses)
