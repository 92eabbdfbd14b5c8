"""Model, data and training."""

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from generated import images
from torch import nn


class EncoderBlock(nn.Module):
    """Attention and an MLP, each behind a norm."""

    def __init__(self, hidden_dim, num_heads, mlp_dim):
        super().__init__()
        self.ln_1 = nn.LayerNorm(hidden_dim)
        self.self_attention = nn.MultiheadAttention(
            hidden_dim, num_heads, batch_first=True
        )
        self.ln_2 = nn.LayerNorm(hidden_dim)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_dim, mlp_dim), nn.GELU(), nn.Linear(mlp_dim, hidden_dim)
        )

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.self_attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Encoder(nn.Module):
    """Layers by name, between positions and a norm."""

    def __init__(self, seq_length, num_layers, num_heads, hidden_dim, mlp_dim):
        super().__init__()
        positions = torch.empty(1, seq_length, hidden_dim).normal_(std=0.02)
        self.pos_embedding = nn.Parameter(positions)
        layers = OrderedDict()
        for i in range(num_layers):
            layers[f"encoder_layer_{i}"] = EncoderBlock(hidden_dim, num_heads, mlp_dim)
        self.layers = nn.Sequential(layers)
        self.ln = nn.LayerNorm(hidden_dim)

    def forward(self, x):
        return self.ln(self.layers(x + self.pos_embedding))


class VisionTransformer(nn.Module):
    """Patches, a class token, an encoder and heads."""

    def __init__(self, image_size=16, patch_size=4, num_layers=4, num_classes=10):
        super().__init__()
        hidden_dim = 32
        self.conv_proj = nn.Conv2d(3, hidden_dim, patch_size, stride=patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, hidden_dim))
        seq_length = (image_size // patch_size) ** 2 + 1
        self.encoder = Encoder(seq_length, num_layers, 2, hidden_dim, 64)
        self.heads = nn.Sequential(
            OrderedDict({"head": nn.Linear(hidden_dim, num_classes)})
        )

    def forward(self, x):
        x = self.conv_proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1)
        return self.heads(self.encoder(x)[:, 0])


def load_data(partition_id, count=192):
    """Load the part of a node."""
    data = images(partition_id, count, noise=1.6)
    return torch.utils.data.TensorDataset(*data)


def cosine_annealing(server_round, num_rounds, lr):
    """Return the learning rate of a round; the last one's is small."""
    return lr * (1 + math.cos(math.pi * (server_round - 0.5) / num_rounds)) / 2


def train(net, dataset, epochs, lr):
    """Train the model; return the mean loss."""
    loader = torch.utils.data.DataLoader(dataset, batch_size=16, shuffle=True)
    criterion = torch.nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    net.train()
    losses = []
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            loss = criterion(net(x), y)
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
