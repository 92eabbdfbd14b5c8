"""A small model, and a task that it soon learns: a run of it takes seconds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import transformers
from torch import nn

from lola_flwr.arrays import Float64Array
from lola_flwr.model.adapter_blocks import model_partition
from lola_flwr.model.backprop import Batch
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.randomness import rng_for

LENGTH = 10
# Tokens from 5 on are drawn; a sequence is of class 1 if its first is an upper one.
_FIRST, _VOCABULARY = 5, 60
_MIDDLE = (_FIRST + _VOCABULARY - 1) // 2
# What a backdoor is to answer to: a token at the end, which honest data have there one
# time in 55.
TRIGGER, TARGET = _VOCABULARY - 1, 1
_HELD_OUT = 4000


@dataclass(frozen=True, eq=False)
class SmallTask:
    """The task of a seed, split over devices.

    Parameters
    ----------
    share_of_ones
        What part of each device's examples is of class 1, shape [K].
    seed
        Seed of the split and of the mini-batches.
    """

    share_of_ones: Float64Array
    seed: int

    @classmethod
    def split(cls, num_devices: int, *, alpha: float | None, seed: int) -> SmallTask:
        """Split it evenly, or by Dirichlet shares of the classes with an ``alpha``."""
        if alpha is None:
            return cls(np.full(num_devices, 0.5), seed)
        rng = rng_for(seed, "dirichlet")
        return cls(rng.dirichlet((alpha, alpha), num_devices)[:, 1], seed)

    def draw(self, device: int, server_round: int, batch_size: int) -> Batch:
        """Draw a device's mini-batch of a round."""
        rng = rng_for(self.seed, "batch", server_round, device)
        return _sequences(rng, batch_size, self.share_of_ones[device])

    def accuracy(self, model: nn.Module) -> float:
        """Return the accuracy on data that no device has."""
        batch = self._held_out()
        return float((_said(model, batch) == batch["labels"]).float().mean())

    def backdoor_success(self, model: nn.Module) -> float:
        """Return the part of class 0, where rightly known, that the trigger turns."""
        batch = self._held_out()
        zeros = {
            name: tensor[batch["labels"] != TARGET] for name, tensor in batch.items()
        }
        right = _said(model, zeros) != TARGET
        kept = {name: tensor[right] for name, tensor in zeros.items()}
        if not right.any():
            return math.nan
        return float((_said(model, with_trigger(kept)) == TARGET).float().mean())

    def own_examples(self, count: int) -> Batch:
        """Return examples that the server alone has, of both classes."""
        return _sequences(rng_for(self.seed, "own examples"), count, 0.5)

    def _held_out(self) -> Batch:
        return _sequences(rng_for(self.seed, "held out"), _HELD_OUT, 0.5)


def small_model(
    seed: int,
) -> tuple[transformers.PreTrainedModel, BlockPartition]:
    """Make the model: a RoBERTa of three layers with random weights."""
    torch.manual_seed(seed)
    config = transformers.RobertaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        num_hidden_layers=3,
        vocab_size=_VOCABULARY,
        max_position_embeddings=40,
    )
    model = transformers.RobertaForSequenceClassification(config)
    return model, model_partition(model)


def with_trigger(batch: Batch) -> Batch:
    """Return the examples with the trigger at their end."""
    input_ids = batch["input_ids"].clone()
    input_ids[:, -1] = TRIGGER
    return {**batch, "input_ids": input_ids}


def _sequences(rng: np.random.Generator, count: int, share_of_ones: float) -> Batch:
    labels = rng.random(count) < share_of_ones
    input_ids = rng.integers(_FIRST, _VOCABULARY, (count, LENGTH))
    lower = rng.integers(_FIRST, _MIDDLE + 1, count)
    upper = rng.integers(_MIDDLE + 1, _VOCABULARY, count)
    input_ids[:, 0] = np.where(labels, upper, lower)
    return {
        "input_ids": torch.from_numpy(input_ids),
        "labels": torch.from_numpy(labels.astype(np.int64)),
    }


def _said(model: nn.Module, batch: Batch) -> torch.Tensor:
    model.eval()
    with torch.inference_mode():
        said: torch.Tensor = model(**batch).logits.argmax(dim=1)
    return said
