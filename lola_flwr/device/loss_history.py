"""Mini-batches drawn by what training has shown of each example so far.

What a step computes anyway, the loss of each example in its mini-batch, is kept, and
the next mini-batches are drawn by it: no forward pass is added. The source is the
training dynamics of data maps (Swayamdipta et al., arXiv:2009.10795), by which FTFT
(arXiv:2310.06588) selects what a model is fine-tuned on: examples are ambiguous where
the chance of the right class varies between epochs. Both select once, after a run of
their own; here it is drawn as the run goes on, by what it has shown itself.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from lola_flwr.arrays import Float64Array, IntArray
from lola_flwr.device.block_device import BlockDevice
from lola_flwr.device.sampler_options import History, Measure
from lola_flwr.errors import UserError
from lola_flwr.machine.files import replacing
from lola_flwr.model.backprop import Batch, model_loss, num_examples_of
from lola_flwr.model.example_losses import (
    EXAMPLE_ROWS,
    EXAMPLE_WEIGHTS,
    example_losses,
    weighted_mean,
)
from lola_flwr.randomness import rng_for
from lola_flwr.wire.versions import digest

_ARRAY = "sums"


@dataclass(frozen=True, eq=False)
class SeenLosses:
    """What was seen of each of a device's examples; sums, so its size stays the same.

    Parameters
    ----------
    sums
        For each example how often it was seen, and sums of its losses, of the chances
        of its class, ``exp(-loss)``, and of their squares; shape [4, N].
    """

    sums: Float64Array

    @classmethod
    def none_of(cls, num_examples: int) -> SeenLosses:
        """Return what is known of examples of which none was seen."""
        return cls(np.zeros((4, num_examples)))

    def also(self, rows: IntArray, losses: Float64Array) -> SeenLosses:
        """Return what is known when the losses of some examples are seen besides."""
        chances = np.exp(-losses)
        looks = (np.ones_like(losses), losses, chances, chances**2)
        # One that was drawn twice counts twice.
        found = [np.bincount(rows, look, self.sums.shape[1]) for look in looks]
        return SeenLosses(self.sums + np.stack(found))

    def worth(self, measure: Measure) -> Float64Array:
        """Return by what examples are drawn, shape [N]; those not known have the mean.

        All are alike where nothing is known of any, or none is worth anything.
        """
        count, losses, chances, squares = self.sums
        times = np.maximum(count, 1.0)
        if measure == "loss":
            known, worth = count > 0, losses / times
        else:
            # Of one look at an example it cannot be told how it varies.
            known = count > 1
            mean = chances / times
            worth = np.sqrt(np.maximum(squares / times - mean**2, 0.0))
        if not worth[known].any():
            return np.ones_like(count)
        filled: Float64Array = np.where(known, worth, worth[known].mean())
        return filled


def draw_chances(seen: SeenLosses, rule: History) -> Float64Array:
    """Return the chance of each example to be drawn next, shape [N]; they sum to 1."""
    worth = seen.worth(rule.measure)
    chances: Float64Array = worth / worth.sum()
    return rule.uniform / len(worth) + (1 - rule.uniform) * chances


@dataclass(frozen=True, kw_only=True, eq=False)
class HistoryBatches:
    """A source of mini-batches that are drawn by a device's history of losses.

    `on` makes a device use it.

    Parameters
    ----------
    num_examples
        Examples N that the device has.
    examples
        Gives those of these rows, 0 to N - 1, as arguments of a classifier.
    store
        Directory of the run in which the history is kept, so that a device that was
        started again goes on with it; others may share it.
    device
        Name of the device.
    rule
        By what examples are drawn. Weighted ones are drawn independently, one
        perhaps twice, so that their weighted mean is without bias; others but once.
    seed
        Seed of the run.
    """

    num_examples: int
    examples: Callable[[IntArray], Batch]
    store: Path
    device: str
    rule: History = field(default_factory=History)
    seed: int = 0

    def on(self, device: BlockDevice) -> BlockDevice:
        """Return a device that draws its mini-batches so, and keeps their losses.

        Raises
        ------
        UserError
            It has a loss of its own, or one that is a mean over something else than
            examples: these could not be told apart.
        """
        usual = device.loss_function is model_loss
        if not usual or device.batch_weight is not num_examples_of:
            raise UserError(
                "A history of losses needs a classifier's own loss, a mean over "
                f"examples; leave {'batch_weight' if usual else 'loss_function'} out, "
                "or draw examples at random."
            )
        return replace(device, batch_source=self, followed_loss=self.followed_loss)

    def __call__(self, server_round: int, batch_size: int) -> Batch:
        """Draw the mini-batch of a round."""
        rng = rng_for(self.seed, "history", server_round, self.device)
        chances = draw_chances(self.seen(), self.rule)
        rows = rng.choice(
            self.num_examples,
            min(batch_size, self.num_examples),
            replace=self.rule.weighted,
            p=chances,
        )
        weights = np.ones(len(rows))
        if self.rule.weighted:
            weights = 1 / (self.num_examples * chances[rows])
        return {
            **self.examples(rows),
            EXAMPLE_WEIGHTS: torch.from_numpy(weights.astype(np.float32)),
            EXAMPLE_ROWS: torch.from_numpy(rows),
        }

    def followed_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of a mini-batch, or of a part, and keep what it shows."""
        losses = example_losses(model, batch)
        rows = batch[EXAMPLE_ROWS].numpy(force=True)
        found = losses.detach().double().numpy(force=True)
        self._keep(self.seen().also(rows, found))
        return weighted_mean(losses, batch)

    def seen(self) -> SeenLosses:
        """Return what is kept; nothing where no file is, or a damaged one.

        Raises
        ------
        UserError
            It is of another number of examples.
        """
        with suppress(FileNotFoundError, SafetensorError, KeyError):
            seen = SeenLosses(load_file(self._path)[_ARRAY])
            if seen.sums.shape != (4, self.num_examples):
                raise UserError(
                    f"{self._path} is a history of {seen.sums.shape[-1]} examples, but "
                    f"{self.device} has {self.num_examples}; remove it, or give the "
                    "device the data that it had."
                )
            return seen
        return SeenLosses.none_of(self.num_examples)

    def _keep(self, seen: SeenLosses) -> None:
        # Devices that share a directory have a file each.
        with replacing(self._path, shared=True) as unfinished:
            save_file({_ARRAY: seen.sums}, unfinished)

    @property
    def _path(self) -> Path:
        # A name may hold what a path must not.
        name = digest([np.frombuffer(self.device.encode(), np.uint8)])
        return self.store / f"history-{name}.safetensors"
