"""Samples are found however far they are padded."""

from __future__ import annotations

import torch
import transformers
from torch import nn

from lola_flwr.device.prefix import ActivationCache, reused_prefix
from lola_flwr.model.backprop import block_gradient
from tests.device.prefix.families import assert_same, gpt2, partition_of


def padded(batch, length):
    width = length - batch["input_ids"].shape[1]
    return {
        "input_ids": nn.functional.pad(batch["input_ids"], (0, width), value=1),
        "attention_mask": nn.functional.pad(batch["attention_mask"], (0, width)),
        "labels": batch["labels"],
    }


def test_samples_are_found_however_far_they_are_padded(roberta, batch):
    partition = partition_of(roberta)
    cache = ActivationCache(10**6)
    rows = []
    roberta.roberta.encoder.layer[0].output.register_forward_hook(
        lambda module, args, output: rows.append(len(output))
    )
    reference = transformers.RobertaForSequenceClassification(roberta.config).eval()
    reference.load_state_dict(roberta.state_dict())
    with reused_prefix(roberta, partition, 2, cache):
        for given, run in (
            (padded(batch, 14), 6),
            (batch, 1),  # to see that padding makes no difference
            ({name: values[[5, 0, 3]] for name, values in batch.items()}, 0),
            # Farther than ever: what becomes of the padding there is not known yet.
            (padded(batch, 16), 6),
            (padded(batch, 12), 0),
        ):
            rows.clear()
            result = block_gradient(roberta, partition, 2, given)
            assert_same(result, block_gradient(reference, partition, 2, given))
            assert sum(rows) == run


def test_a_loss_may_read_what_becomes_of_padding(roberta, batch):
    # As that of question answering does: every position may be the answer's first.
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.roberta = roberta.roberta

        def forward(self, input_ids, attention_mask, labels):
            states = self.roberta(input_ids, attention_mask).last_hidden_state
            return {"loss": (states[..., 0] * torch.arange(len(states[0]))).mean()}

    model = Whole().eval()
    partition = partition_of(model)

    def loss(model, batch):
        return model(**batch)["loss"]

    def gradient(given):
        return block_gradient(model, partition, 2, given, loss_function=loss)

    batches = [padded(batch, 14), padded(batch, 14), batch]
    expected = [gradient(given) for given in batches]
    cache = ActivationCache(10**6)
    with reused_prefix(model, partition, 2, cache):
        for given, plain in zip(batches, expected, strict=True):
            assert_same(gradient(given), plain)
    assert cache.hits == 12


class Averaging(nn.Module):
    """Below its last layer every position sees all others, padding too."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(60, 4)
        self.layers = nn.ModuleList(Mean() for _ in range(3))

    def forward(self, input_ids, attention_mask, labels):
        states = self.embed(input_ids)
        for layer in self.layers:
            states = layer(states)
        return {"loss": (states[:, 0] * labels[:, None]).square().mean()}


class Mean(nn.Module):
    def __init__(self):
        super().__init__()
        self.map = nn.Linear(4, 4)

    def forward(self, states):
        return states + torch.tanh(self.map(states)).mean(1, keepdim=True)


def test_layers_that_read_padding_are_run_for_every_length(batch):
    torch.manual_seed(0)
    model = Averaging().eval()
    partition = partition_of(model)

    def gradient(given):
        return block_gradient(
            model, partition, 2, given, loss_function=lambda m, b: m(**b)["loss"]
        )

    cache = ActivationCache(10**6)
    given = [padded(batch, 14), batch, batch, padded(batch, 14)]
    expected = [gradient(each) for each in given]
    with reused_prefix(model, partition, 2, cache):
        for each, plain in zip(given, expected, strict=True):
            assert_same(gradient(each), plain)


def test_left_padding_is_told_apart(batch):
    torch.manual_seed(0)
    model = gpt2().eval()
    partition = partition_of(model)
    ids = batch["input_ids"][:2, :7]
    labels = batch["labels"][:2]
    cache = ActivationCache(10**6)
    for width in (0, 3, 5):
        padding = (width, 0)
        shifted = {
            "input_ids": nn.functional.pad(ids, padding, value=1),
            "attention_mask": nn.functional.pad(torch.ones_like(ids), padding),
            "labels": labels,
        }
        expected = block_gradient(model, partition, 2, shifted)
        with reused_prefix(model, partition, 2, cache):
            assert_same(block_gradient(model, partition, 2, shifted), expected)
    assert cache.hits == 0
