"""Data, and a trainer."""

import torch
from generated import text


def load_data(partition_id, count=96):
    """Return the batches of a node."""
    return text(partition_id, count).split(16)


class Trainer:
    """Trains what wants gradients."""

    def __init__(self, model, train_dataset, learning_rate, num_train_epochs):
        self.model = model
        self.train_dataset = train_dataset
        self.learning_rate = learning_rate
        self.num_train_epochs = num_train_epochs

    def train(self):
        """Return the mean loss."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=self.learning_rate)
        self.model.train()
        losses = []
        for _ in range(self.num_train_epochs):
            for ids in self.train_dataset:
                loss = self.model(input_ids=ids, labels=ids).loss
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
