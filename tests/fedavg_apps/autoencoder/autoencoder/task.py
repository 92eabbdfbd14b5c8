"""An autoencoder in the manner of Lightning: the module has its training step."""

import torch
import torch.nn.functional as F
from generated import signals
from torch import nn


class LitAutoEncoder(nn.Module):
    """Encoder and decoder, with what a trainer asks a module for."""

    def __init__(self, learning_rate=1e-3):
        super().__init__()
        self.learning_rate = learning_rate
        self.encoder = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 6))
        self.decoder = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 32))

    def forward(self, x):
        return self.decoder(self.encoder(x))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch), batch)

    def test_step(self, batch, batch_idx):
        return F.mse_loss(self(batch), batch).item()


class Trainer:
    """Carries a module's steps out."""

    def __init__(self, max_epochs=1):
        self.max_epochs = max_epochs

    def fit(self, module, batches):
        """Train the module; return the mean loss of the last epoch."""
        optimizer = module.configure_optimizers()
        module.train()
        for _ in range(self.max_epochs):
            losses = []
            for index, batch in enumerate(batches):
                loss = module.training_step(batch, index)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        return sum(losses) / len(losses)

    def test(self, module, batches):
        """Return the mean loss."""
        module.eval()
        with torch.no_grad():
            losses = [module.test_step(x, index) for index, x in enumerate(batches)]
        return sum(losses) / len(losses)


def load_data(partition_id, count=192):
    """Return the batches of a node."""
    return signals(partition_id, count).split(16)
