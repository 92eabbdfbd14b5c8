"""Build a coordinator around a model: its optimizer, its fingerprint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from lola_flwr.costs.measured import Example
from lola_flwr.costs.of_model import model_costs
from lola_flwr.d2ft.subnetworks import find_subnetworks
from lola_flwr.errors import UserError
from lola_flwr.model.adapters import model_partition
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.model.loading import fingerprint
from lola_flwr.server.coordinator import Coordinator
from lola_flwr.server.low_rank_optimizer import LowRankOptimizer
from lola_flwr.server.optimizer import ServerOptimizer
from lola_flwr.server.spread.trainer import SpreadTrainer
from lola_flwr.wire.low_rank import LowRankProjection


def coordinator_for(
    model: nn.Module,
    partition: BlockPartition,
    *,
    optimizer: str = "AdamW",
    lr: float = 3e-4,
    optimizer_options: Mapping[str, Any] | None = None,
    low_rank: LowRankProjection | None = None,
    **options: Any,
) -> Coordinator:
    """Put a coordinator together that fine-tunes a model from its present values.

    Parameters
    ----------
    model
        The model; its values are copied.
    partition
        Its blocks.
    optimizer, lr, optimizer_options
        Name and keyword arguments of the server's optimizer and of its schedule, as for
        ``ServerOptimizer``.
    low_rank
        How gradients are projected; the optimizer then steps in the projected space.
    **options
        Further arguments of ``Coordinator``: ``costs`` and ``bandwidth_hz`` at least.

    Raises
    ------
    LayerNotUnderstood
        ``reduced_schedules`` of a model whose layers cannot run in part.
    """
    if options.get("reduced_schedules"):
        find_subnetworks(model, partition, num_groups=1)
    values = _trainable_values(model, partition)
    settings = {"optimizer": optimizer, "lr": lr, **(optimizer_options or {})}
    return Coordinator(
        partition=partition,
        optimizer=(
            ServerOptimizer(values, **settings)
            if low_rank is None
            else LowRankOptimizer(values, low_rank, **settings)
        ),
        low_rank=low_rank,
        base_fingerprint=fingerprint(model, partition.frozen),
        **options,
    )


def trainer_for(
    model: nn.Module,
    partition: BlockPartition,
    *,
    optimizer: str = "AdamW",
    lr: float = 3e-4,
    optimizer_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> SpreadTrainer:
    """Put a trainer together that fine-tunes a model spread over devices (D2FT).

    Parameters
    ----------
    model
        The model; its values are copied, and overwritten in every step.
    partition
        Its blocks.
    optimizer, lr, optimizer_options
        As for `coordinator_for`.
    **options
        Further arguments of ``SpreadTrainer``: ``schedules`` at least.

    Raises
    ------
    LayerNotUnderstood
        The model's layers cannot be cut into sub-networks.
    """
    settings = {"optimizer": optimizer, "lr": lr, **(optimizer_options or {})}
    own = ServerOptimizer(_trainable_values(model, partition), **settings)
    return SpreadTrainer(model, partition, optimizer=own, **options)


def coordinator_for_weights(
    model: nn.Module,
    *,
    batch_size: int,
    sequence_length: int = 1,
    stack: str | None = None,
    blocks: str | Sequence[str] | None = None,
    example: Example | None = None,
    bandwidth_hz: float = 20e6,
    optimizer: str = "SGD",
    lr: float = 1.0,
    optimizer_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Coordinator:
    """Make the coordinator of a project whose devices train the model themselves.

    Devices are sent the whole state dict and return weights. The server's step is
    then a damped move towards them, which is what SGD with a rate of 1 does.

    Parameters
    ----------
    model
        The model, with the values to start from.
    batch_size
        Examples of a device's mini-batch.
    sequence_length
        Tokens of an example; 1 where examples are no sequences.
    stack, blocks
        Where the blocks are not the layers of the longest stack: as for
        ``partition_parameters``.
    example
        The model's input for some examples (``torch.zeros(1, 3, 224, 224)``): costs
        are measured on it. Needed for convolutions, and whatever else the estimate
        from shapes does not know.
    bandwidth_hz
        Total uplink bandwidth.
    optimizer, lr, optimizer_options
        Name and keyword arguments of the server's optimizer and of its schedule, as
        for ``ServerOptimizer``.
    **options
        Further arguments of ``Coordinator``.

    Raises
    ------
    UserError
        The model does not show one stack of equal layers, what its blocks cost cannot
        be estimated, trained parameters go by two names, or arrays have a type that
        NumPy lacks.
    """
    parameters = dict(model.named_parameters())
    partition = model_partition(model, stack=stack, blocks=blocks)
    trained = {id(parameters[name]): name for name in partition.trainable}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if trained.get(id(parameter), name) != name:
            raise UserError(
                f"{name} and {trained[id(parameter)]} are one parameter, which "
                "would be trained under one name and sent under both; untie them."
            )
    state = {
        name: _array(name, tensor).copy() for name, tensor in model.state_dict().items()
    }
    costs = model_costs(
        model,
        partition,
        batch_size=batch_size,
        sequence_length=sequence_length,
        example=example,
    )
    return coordinator_for(
        model,
        partition,
        costs=costs,
        bandwidth_hz=bandwidth_hz,
        optimizer=optimizer,
        lr=lr,
        optimizer_options=optimizer_options,
        batch_size=batch_size,
        state_dict=state,
        **options,
    )


def _trainable_values(
    model: nn.Module, partition: BlockPartition
) -> dict[str, npt.NDArray[Any]]:
    parameters = dict(model.named_parameters())
    return {name: _array(name, parameters[name]) for name in partition.trainable}


def _array(name: str, tensor: Tensor) -> npt.NDArray[Any]:
    """Return a tensor as an array, which cannot hold all of PyTorch's types."""
    try:
        return np.asarray(tensor.numpy(force=True))
    except TypeError:
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise UserError(
            f"{name} is of type {dtype}, which NumPy and Flower's arrays lack: use "
            "model.float() on server and devices."
        ) from None
