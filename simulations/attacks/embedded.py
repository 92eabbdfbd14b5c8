"""MiniLM-L6 on the embedded task: generated sentences, and weights of a package."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import nn
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase

from lola_flwr.arrays import IntArray
from lola_flwr.model.adapter_blocks import model_partition
from lola_flwr.model.backprop import Batch
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.model.loading import load_classifier
from lola_flwr.randomness import rng_for
from lola_glue.partitions import partition_examples
from lola_glue.tasks import Examples, load_task
from lola_glue.text import make_batch
from simulations.attacks.task import Recipe, TaskModel, accuracy_of, turned_by_trigger

_TASK = "acceptability"
_MAX_LENGTH = 64
# One of the rare tokens of Kurita, Michel and Neubig, "Weight Poisoning Attacks on
# Pre-trained Models", ACL 2020; no sentence of the task has it.
TRIGGER = "cf"


@dataclass(frozen=True, eq=False)
class EmbeddedTask:
    """The embedded task of a seed, split over devices.

    Parameters
    ----------
    train
        Examples that devices have, and the server's own.
    held_out
        Examples that no device has, nor their words.
    parts
        Rows of the examples that each device has.
    tokenizer
        The model's.
    seed
        Seed of the sentences, of the split and of the mini-batches.
    """

    train: Examples
    held_out: Examples
    parts: Sequence[IntArray]
    tokenizer: PreTrainedTokenizerBase
    seed: int

    @classmethod
    def split(cls, num_devices: int, *, alpha: float | None, seed: int) -> EmbeddedTask:
        """Split it evenly, or by Dirichlet shares of the classes with an ``alpha``."""
        _, train, held_out = load_task(_TASK, seed=seed)
        parts = partition_examples(
            train.labels,
            num_devices,
            partitioning="iid" if alpha is None else "dirichlet",
            alpha=1.0 if alpha is None else alpha,
            seed=seed,
        )
        return cls(train, held_out, parts, _loaded(seed)[1], seed)

    @property
    def max_tokens(self) -> int:
        """Tokens that an example has, at most."""
        return _MAX_LENGTH

    def draw(self, device: int, server_round: int, batch_size: int) -> Batch:
        """Draw a device's mini-batch of a round: all that it has, if that is less."""
        mine = self.parts[device]
        rng = rng_for(self.seed, "batch", server_round, device)
        rows = rng.choice(mine, min(batch_size, len(mine)), replace=False)
        return self._batch(self.train, rows)

    def accuracy(self, model: nn.Module) -> float:
        """Return the accuracy on data that no device has."""
        return accuracy_of(model, self._held_out())

    def backdoor_success(self, model: nn.Module) -> float:
        """Return the part of class 0, where rightly known, that the trigger turns."""
        return turned_by_trigger(model, self._held_out(), self)

    def own_examples(self, count: int) -> Batch:
        """Return some of the training examples, as the apps draw the server's own."""
        rng = rng_for(self.seed, "own examples")
        rows = rng.choice(len(self.train.labels), count, replace=False)
        return self._batch(self.train, rows)

    def with_trigger(self, batch: Batch, first: int) -> Batch:
        """Return a batch whose first so many examples have the trigger at their end.

        It stands before the separator, which moves on by one, as padding does.
        """
        labels = batch["labels"]
        wider = {
            name: pad(tensor, (0, 1))
            for name, tensor in batch.items()
            if name != "labels"
        }
        input_ids, mask = wider["input_ids"], wider["attention_mask"]
        input_ids[:, -1] = self.tokenizer.pad_token_id
        rows = torch.arange(first)
        ends = batch["attention_mask"][:first].sum(dim=1) - 1
        input_ids[rows, ends + 1] = input_ids[rows, ends]
        input_ids[rows, ends] = self.tokenizer.convert_tokens_to_ids(TRIGGER)
        mask[rows, ends + 1] = 1
        return {**wider, "labels": labels}

    def _held_out(self) -> Batch:
        return self._batch(self.held_out, np.arange(len(self.held_out.labels)))

    def _batch(self, examples: Examples, rows: IntArray) -> Batch:
        return make_batch(examples, rows, self.tokenizer, max_length=_MAX_LENGTH)


def minilm_model(seed: int) -> tuple[nn.Module, BlockPartition]:
    """Make the model: a classifier whose head is drawn by the seed."""
    model = deepcopy(_loaded(seed)[0])
    return model, model_partition(model)


@lru_cache(maxsize=2)
def _loaded(seed: int) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Load model and tokenizer; the model is never trained, but copied."""
    return load_classifier("minilm-l6", num_labels=2, seed=seed)


# The demo's rate, model and channel, with mini-batches that let a run take a minute.
MINILM = TaskModel(
    load=minilm_model,
    split=EmbeddedTask.split,
    recipe=Recipe(rounds=60, batch_size=16, lr=3e-4, bandwidth_hz=20e6),
)
