"""A small model, and a task that it soon learns: a run of it takes seconds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import transformers
from torch import nn

from lola_flwr.arrays import Float64Array
from lola_flwr.model.adapter_blocks import model_partition
from lola_flwr.model.backprop import Batch
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.randomness import rng_for
from simulations.attacks.task import Recipe, TaskModel, accuracy_of, turned_by_trigger

_LENGTH = 10
# Tokens from 5 on are drawn; a sequence is of class 1 if its first is an upper one.
_FIRST, _VOCABULARY = 5, 60
_MIDDLE = (_FIRST + _VOCABULARY - 1) // 2
# What a backdoor is to answer to: a token at the end, which honest data have there one
# time in 55.
_TRIGGER = _VOCABULARY - 1
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

    @property
    def max_tokens(self) -> int:
        """Tokens that an example has, at most."""
        return _LENGTH

    def draw(self, device: int, server_round: int, batch_size: int) -> Batch:
        """Draw a device's mini-batch of a round."""
        rng = rng_for(self.seed, "batch", server_round, device)
        return _sequences(rng, batch_size, self.share_of_ones[device])

    def accuracy(self, model: nn.Module) -> float:
        """Return the accuracy on data that no device has."""
        return accuracy_of(model, self._held_out())

    def backdoor_success(self, model: nn.Module) -> float:
        """Return the part of class 0, where rightly known, that the trigger turns."""
        return turned_by_trigger(model, self._held_out(), self)

    def own_examples(self, count: int) -> Batch:
        """Return examples that the server alone has, of both classes."""
        return _sequences(rng_for(self.seed, "own examples"), count, 0.5)

    def with_trigger(self, batch: Batch, first: int) -> Batch:
        """Return a batch whose first so many examples have the trigger at their end."""
        input_ids = batch["input_ids"].clone()
        input_ids[:first, -1] = _TRIGGER
        return {**batch, "input_ids": input_ids}

    def _held_out(self) -> Batch:
        return _sequences(rng_for(self.seed, "held out"), _HELD_OUT, 0.5)


def small_model(
    seed: int, *, num_heads: int = 2, head_dropout: float = 0.1
) -> tuple[transformers.PreTrainedModel, BlockPartition]:
    """Make the model: a RoBERTa of three layers with random weights."""
    torch.manual_seed(seed)
    config = transformers.RobertaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=num_heads,
        num_hidden_layers=3,
        vocab_size=_VOCABULARY,
        max_position_embeddings=40,
        classifier_dropout=head_dropout,
    )
    model = transformers.RobertaForSequenceClassification(config)
    return model, model_partition(model)


def _sequences(rng: np.random.Generator, count: int, share_of_ones: float) -> Batch:
    labels = rng.random(count) < share_of_ones
    input_ids = rng.integers(_FIRST, _VOCABULARY, (count, _LENGTH))
    lower = rng.integers(_FIRST, _MIDDLE + 1, count)
    upper = rng.integers(_MIDDLE + 1, _VOCABULARY, count)
    input_ids[:, 0] = np.where(labels, upper, lower)
    return {
        "input_ids": torch.from_numpy(input_ids),
        "labels": torch.from_numpy(labels.astype(np.int64)),
    }


SMALL = TaskModel(
    load=small_model,
    split=SmallTask.split,
    recipe=Recipe(rounds=240, batch_size=16, lr=1e-2, bandwidth_hz=1e6),
)
# With four heads it has twelve sub-networks: as many as there are devices. Without
# dropout in its head owners' losses are compared with those of labels.
SPREAD_SMALL = TaskModel(
    load=partial(small_model, num_heads=4, head_dropout=0.0),
    split=SMALL.split,
    recipe=SMALL.recipe,
)
