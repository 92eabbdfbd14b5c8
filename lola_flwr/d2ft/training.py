"""Gradients under a schedule: of a batch in micro-batches, or of a device's block."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lola_flwr.d2ft.execution import require_layers, scheduled
from lola_flwr.d2ft.find import find_subnetworks
from lola_flwr.d2ft.operations import Operation
from lola_flwr.d2ft.subnetworks import Subnetworks
from lola_flwr.errors import UserError
from lola_flwr.model.backprop import (
    Batch,
    BatchWeight,
    BlockGradient,
    LossFunction,
    Split,
    block_gradient,
    evenly,
    model_loss,
    num_examples_of,
    only_trainable,
)
from lola_flwr.model.blocks import BlockPartition


def split_batch(batch: Batch, count: int) -> list[Batch]:
    """Split a batch into micro-batches whose sizes differ by at most one example.

    Parameters
    ----------
    batch
        Tensors whose first dimension counts the examples.
    count
        Number of micro-batches, at most as many as examples.
    """
    parts = {name: torch.tensor_split(t, count) for name, t in batch.items()}
    return [{name: parts[name][i] for name in parts} for i in range(count)]


def scheduled_gradient(
    model: nn.Module,
    subnetworks: Subnetworks,
    trainable: Sequence[str],
    micro_batches: Sequence[Batch],
    operations: npt.NDArray[np.int64],
    *,
    loss_function: LossFunction = model_loss,
    batch_weight: BatchWeight = num_examples_of,
) -> BlockGradient:
    """Compute the gradient of the mean loss over all examples, under a schedule.

    Parameters
    ----------
    model
        The model, in the mode that the gradient is wanted in.
    subnetworks
        Its sub-networks.
    trainable
        Names of the parameters to train.
    micro_batches
        M micro-batches; one runs after the other.
    operations
        What each sub-network does in each of them, shape [S, M].
    loss_function
        Maps model and micro-batch to a mean loss.
    batch_weight
        What that loss is a mean over (default: examples).

    Returns
    -------
    BlockGradient
        With everything run fully, the gradient itself. Otherwise it is biased: outputs
        lack what is skipped, and gradients what does not flow back.

    Raises
    ------
    NoGradient
        A layer that runs fully has none, as far as PyTorch has recorded.
    UserError
        The micro-batches weigh nothing.
    """
    total: dict[str, Tensor] = {}
    weights = [batch_weight(batch) for batch in micro_batches]
    if not any(weights):
        raise UserError(
            "The losses of the micro-batches are means over nothing: no token of them "
            "has a label; give them examples that have."
        )
    loss_sum = 0.0
    with only_trainable(model, trainable) as wanted:
        for index, batch in enumerate(micro_batches):
            if not weights[index]:
                continue
            table = operations[:, index].reshape(
                subnetworks.num_layers, subnetworks.num_groups
            )
            with scheduled(subnetworks, [[Operation(o) for o in row] for row in table]):
                loss = loss_function(model, batch)
                share = weights[index] / sum(weights)
                found = torch.autograd.grad(
                    share * loss, [*wanted.values()], allow_unused=True
                )
            gradients = dict(zip(trainable, found, strict=True))
            trained = np.flatnonzero((table == Operation.FULL).any(axis=1))
            require_layers(subnetworks, wanted, gradients, trained)
            for name, gradient in gradients.items():
                if gradient is None:
                    continue
                if name in total:
                    total[name] += gradient
                else:
                    total[name] = gradient
            loss_sum += loss.item() * weights[index]
    return BlockGradient(
        gradients={
            name: total.get(name, torch.zeros_like(parameter))
            for name, parameter in wanted.items()
        },
        loss=loss_sum / sum(weights),
        num_examples=sum(weights),
    )


def reduced_gradient(
    model: nn.Module,
    partition: BlockPartition,
    block_index: int,
    batch: Batch,
    operations: Sequence[Operation],
    *,
    loss_function: LossFunction = model_loss,
    micro_batch_size: int = 0,
    batch_weight: BatchWeight = num_examples_of,
    split: Split = evenly,
) -> BlockGradient:
    """Compute a block's gradient under a reduced schedule.

    Parameters are those of `block_gradient`, and the operation of each layer.
    """
    subnetworks = find_subnetworks(model, partition, num_groups=1)
    with scheduled(subnetworks, [[operation] for operation in operations]):
        return block_gradient(
            model,
            partition,
            block_index,
            batch,
            loss_function=loss_function,
            micro_batch_size=micro_batch_size,
            batch_weight=batch_weight,
            split=split,
        )
