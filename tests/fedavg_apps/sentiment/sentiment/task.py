"""Model, data and training."""

import torch
from generated import sentences
from transformers import AutoModelForSequenceClassification, DistilBertConfig


def get_model():
    """Make a small DistilBERT, whose weights a checkpoint would give."""
    config = DistilBertConfig(
        vocab_size=64,
        max_position_embeddings=16,
        n_layers=4,
        n_heads=2,
        dim=32,
        hidden_dim=64,
        num_labels=4,
        initializer_range=0.1,
    )
    return AutoModelForSequenceClassification.from_config(config)


def load_data(partition_id, count=192):
    """Return the batches of a node."""
    ids, labels = sentences(partition_id, count)
    mask = torch.ones_like(ids)
    return [
        {"input_ids": i, "attention_mask": m, "labels": y}
        for i, m, y in zip(ids.split(16), mask.split(16), labels.split(16), strict=True)
    ]


def train(net, batches, epochs, lr):
    """Train the model; return the mean loss."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr)
    net.train()
    losses = []
    for _ in range(epochs):
        for batch in batches:
            loss = net(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return sum(losses) / len(losses)


def test(net, batches):
    """Return loss and accuracy."""
    net.eval()
    loss, correct, examples = 0.0, 0, 0
    for batch in batches:
        with torch.no_grad():
            outputs = net(**batch)
        predictions = torch.argmax(outputs.logits, dim=-1)
        correct += (predictions == batch["labels"]).sum().item()
        loss += outputs.loss.item()
        examples += len(predictions)
    return loss / len(batches), correct / examples
