"""Gradients of the server's own examples, one by one, as far as they are looked at."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from lola_flwr.arrays import Float32Array, Float32Arrays, IntArray
from lola_flwr.errors import reason_of
from lola_flwr.model.backprop import (
    Batch,
    BatchWeight,
    LossFunction,
    block_gradient,
    model_loss,
    num_examples_of,
)
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.model.example_rows import Rows, example_rows
from lola_flwr.model.lengths import (
    cut,
    padding_of,
    pass_tokens,
    per_token,
    without_padding,
)
from lola_flwr.model.loading import load_values
from lola_flwr.model.stored_base import evaluation_mode

_logger = logging.getLogger(__name__)

# Examples that are computed at a time: as many as a device's usual mini-batch has.
_AT_A_TIME = 16
# Examples that are tried, one by one, before many at once are believed.
_TRIED = 3
# Examples of a class that make it a group: the mean of fewer is mostly noise.
_OF_A_GROUP = 8
# By what part of a block's gradient the two may differ. Rounding to 16 bits stays below
# it, what a model does otherwise with a batch does not.
_SAME = 0.02


@dataclass(eq=False)
class ExampleGradientsOf:
    """Gives rows of the gradients of some examples; made by `example_gradients`."""

    model: nn.Module
    partition: BlockPartition
    batch_of: Callable[[IntArray], Batch]
    count: int
    loss_function: LossFunction
    batch_weight: BatchWeight
    is_separable: bool | None = field(default=None, init=False)

    @cached_property
    def groups(self) -> IntArray:
        """The number of each example's group, [R]: those of a class are one.

        All are one where a class has too few to have a mean of its own, and where
        labels are no classes: numbers, or a label for every token.
        """
        labels = self.batch_of(np.arange(self.count)).get("labels")
        if labels is None or labels.ndim != 1 or labels.is_floating_point():
            return np.zeros(self.count, int)
        _, groups, sizes = np.unique(
            labels.numpy(force=True), return_inverse=True, return_counts=True
        )
        return groups if sizes.min() >= _OF_A_GROUP else np.zeros(self.count, int)

    def __call__(
        self, values: Float32Arrays, chosen: IntArray, rows: Rows
    ) -> dict[str, Float32Array]:
        """Compute them at some values.

        Parameters
        ----------
        values
            Of all trainable parameters.
        chosen
            Numbers of R examples.
        rows
            Rows of the parameters' gradients, None: all.

        Returns
        -------
        By parameter: of each example its V values in these rows, one after the other,
        shape [R, V].
        """
        names = self.partition.trainable
        load_values(self.model, names, [values[name] for name in names])
        evaluation_mode(self.model)
        if self.is_separable is None:
            return self._tried(chosen, rows)
        if self.is_separable:
            return self._at_once(chosen, rows)
        return self._one_by_one(chosen, rows)

    def _tried(self, chosen: IntArray, rows: Rows) -> dict[str, Float32Array]:
        """Compute many at once, if some then have the gradients they have alone."""
        few = self._one_by_one(chosen[:_TRIED], rows)
        why = "they are others than those of one after the other"
        try:
            found = self._at_once(chosen, rows)
            self.is_separable = self._are_same(few, found)
        # A model's own code says in its own way that it cannot do many at once.
        except Exception as error:
            self.is_separable, why = False, reason_of(error)
        if self.is_separable:
            return found
        _logger.warning(
            "the gradients of the server's own examples are computed one after the "
            "other, which takes some three times as long: for many at once %s",
            why,
        )
        return self._one_by_one(chosen, rows)

    def _are_same(self, few: Float32Arrays, found: Float32Arrays) -> bool:
        """Tell whether gradients are the same, block by block."""
        partition = self.partition
        for names in (*partition.blocks, partition.head):
            apart = whole = 0.0
            for name in names:
                apart += float(np.square(found[name][:_TRIED] - few[name]).sum())
                whole += float(np.square(few[name]).sum())
            # So that what is no number is not the same, either.
            if not apart <= _SAME**2 * whole:
                return False
        return True

    def _one_by_one(self, chosen: IntArray, rows: Rows) -> dict[str, Float32Array]:
        blocks = [*range(self.partition.num_blocks)]
        every: dict[str, list[Tensor]] = {name: [] for name in rows}
        for number in chosen:
            found = block_gradient(
                self.model,
                self.partition,
                blocks,
                self.batch_of(np.array([number])),
                loss_function=self.loss_function,
                batch_weight=self.batch_weight,
            ).gradients
            for name, wanted in rows.items():
                gradient = found[name]
                if wanted is not None and gradient.ndim > 1:
                    gradient = gradient[torch.from_numpy(wanted)]
                every[name].append(gradient.flatten().float())
        return {n: torch.stack(each).numpy(force=True) for n, each in every.items()}

    def _at_once(self, chosen: IntArray, rows: Rows) -> dict[str, Float32Array]:
        parameters = dict(self.model.named_parameters())
        found: dict[str, Float32Array] = {}
        for places, batch in self._micro_batches(self.batch_of(chosen)):
            weights = _weights(batch, self.batch_weight)
            total = self.batch_weight(batch)

            def loss(batch: Batch = batch) -> Tensor:
                return self.loss_function(self.model, batch)

            some = example_rows(self.model, rows, len(places), loss)
            # A batch's loss is a mean, of which each example's own is a part.
            scale = total / np.where(weights, weights, np.inf)
            for name, wanted in rows.items():
                if name not in found:
                    size = _size(parameters[name], wanted)
                    found[name] = np.zeros((len(chosen), size), np.float32)
                if name in some:
                    of_examples = some[name].numpy(force=True)
                    found[name][places] = of_examples * scale[:, None].astype("f4")
        return found

    def _micro_batches(self, batch: Batch) -> Iterator[tuple[IntArray, Batch]]:
        """Cut a batch so that little padding is computed; give places in it, too."""
        count = num_examples_of(batch)
        padding = padding_of(batch)
        if padding is None:
            for places in np.array_split(np.arange(count), -(-count // _AT_A_TIME)):
                yield places, {n: v[places] for n, v in batch.items()}
            return
        names = per_token(batch)
        order = np.argsort(-padding.lengths, kind="stable")
        ends = cut(
            padding.lengths[order],
            pass_tokens=pass_tokens(self.model, self.partition),
            most_examples=_AT_A_TIME,
        )
        for start, end in pairwise(ends):
            places = order[start:end]
            yield places, without_padding(batch, names, padding, places)


def example_gradients(
    model: nn.Module,
    partition: BlockPartition,
    batch_of: Callable[[IntArray], Batch],
    count: int,
    *,
    loss_function: LossFunction = model_loss,
    batch_weight: BatchWeight = num_examples_of,
) -> ExampleGradientsOf:
    """Return what gives the gradients of some examples, one by one, at given values.

    Many are computed at once where that gives the same, which is tried on a few of them
    in the first call; otherwise, which is logged, one after the other.

    Parameters
    ----------
    model, partition
        The model, whose values are overwritten at every call, and its blocks. It
        computes without dropout.
    batch_of
        Gives a batch of the examples of some numbers, from 0 to ``count`` - 1.
    count
        Examples.
    loss_function, batch_weight
        As in `block_gradient`.
    """
    return ExampleGradientsOf(
        model, partition, batch_of, count, loss_function, batch_weight
    )


def _weights(batch: Batch, batch_weight: BatchWeight) -> IntArray:
    """Return what each example of a batch weighs in its loss, [B]."""
    return np.array(
        [
            batch_weight({name: values[n : n + 1] for name, values in batch.items()})
            for n in range(num_examples_of(batch))
        ]
    )


def _size(parameter: Tensor, rows: IntArray | None) -> int:
    """Return how many values some rows of a parameter have."""
    if rows is None or parameter.ndim < 2:
        return parameter.numel()
    return parameter[0].numel() * len(rows)
