"""What is learned while some attack: a model, its task, and how both are trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from lola_flwr.model.backprop import Batch
from lola_flwr.model.blocks import BlockPartition

# The class that a backdoor's trigger is to mean; each task has two.
TARGET = 1


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is trained.

    Parameters
    ----------
    rounds, batch_size, lr
        As in any run; the rate falls to nothing, lest accuracy go up and down.
    bandwidth_hz
        Bandwidth of the simulated uplink.
    """

    rounds: int
    batch_size: int
    lr: float
    bandwidth_hz: float


class AttackedTask(Protocol):
    """A task of two classes, split over devices."""

    @property
    def max_tokens(self) -> int:
        """Tokens that an example has, at most."""

    def draw(self, device: int, server_round: int, batch_size: int) -> Batch:
        """Draw a device's mini-batch of a round: the same whenever it is asked for."""

    def accuracy(self, model: nn.Module) -> float:
        """Return the accuracy on data that no device has."""

    def backdoor_success(self, model: nn.Module) -> float:
        """Return the part of class 0, where rightly known, that the trigger turns."""

    def own_examples(self, count: int) -> Batch:
        """Return examples that the server has, of both classes."""

    def with_trigger(self, batch: Batch, first: int) -> Batch:
        """Return a batch whose first so many examples have the trigger at their end."""


class SplitTask(Protocol):
    """Makes the task of a seed, split over devices."""

    def __call__(
        self, num_devices: int, *, alpha: float | None, seed: int
    ) -> AttackedTask:
        """Split it evenly, or by Dirichlet shares of the classes with an ``alpha``."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TaskModel:
    """A model, and the task that it learns.

    Parameters
    ----------
    load
        Makes the model of a seed, apart from any other, and its blocks.
    split
        Makes the task.
    recipe
        How it is trained.
    """

    load: Callable[[int], tuple[nn.Module, BlockPartition]]
    split: SplitTask
    recipe: Recipe


def accuracy_of(model: nn.Module, batch: Batch) -> float:
    """Return the part of a batch that a model is right about."""
    return float((_said(model, batch) == batch["labels"]).float().mean())


def turned_by_trigger(model: nn.Module, batch: Batch, task: AttackedTask) -> float:
    """Return the part of class 0, where rightly known, that the trigger turns.

    Returns
    -------
    NaN where nothing of that class is known.
    """
    zeros = {name: tensor[batch["labels"] != TARGET] for name, tensor in batch.items()}
    right = _said(model, zeros) != TARGET
    kept = {name: tensor[right] for name, tensor in zeros.items()}
    if not right.any():
        return math.nan
    triggered = task.with_trigger(kept, len(kept["labels"]))
    return float((_said(model, triggered) == TARGET).float().mean())


def _said(model: nn.Module, batch: Batch) -> torch.Tensor:
    model.eval()
    with torch.inference_mode():
        said: torch.Tensor = model(**batch).logits.argmax(dim=1)
    return said
