"""Gradients of single examples: how far they differ tells what a mini-batch's may."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import nn

from lola_flwr.arrays import Float32Arrays
from lola_flwr.model.backprop import Batch, LossFunction, block_gradient, model_loss
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.model.loading import load_values
from lola_flwr.model.stored_base import evaluation_mode


def example_gradients(
    model: nn.Module,
    partition: BlockPartition,
    examples: Sequence[Batch],
    *,
    loss_function: LossFunction = model_loss,
) -> Callable[[Float32Arrays], Iterator[Float32Arrays]]:
    """Return what gives the gradients of some examples, one by one, at given values.

    Parameters
    ----------
    model, partition
        The model, whose values are overwritten at every call, and its blocks. It
        computes without dropout.
    examples
        Batches of one example each.
    loss_function
        As in `block_gradient`.
    """
    blocks = range(partition.num_blocks)

    def gradients(values: Float32Arrays) -> Iterator[Float32Arrays]:
        names = partition.trainable
        load_values(model, names, [values[name] for name in names])
        evaluation_mode(model)
        for example in examples:
            found = block_gradient(
                model, partition, [*blocks], example, loss_function=loss_function
            )
            yield {n: g.numpy(force=True) for n, g in found.gradients.items()}

    return gradients
