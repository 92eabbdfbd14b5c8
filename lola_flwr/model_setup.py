"""Build a coordinator around a model: its costs, its optimizer, its fingerprint."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from lola_flwr.adapter_costs import measured_costs
from lola_flwr.adapters import base_weights, model_partition
from lola_flwr.blocks import BlockPartition, passed_names
from lola_flwr.coordinator import Coordinator
from lola_flwr.d2ft.subnetworks import find_subnetworks
from lola_flwr.errors import UserError
from lola_flwr.low_rank import LowRankProjection
from lola_flwr.low_rank_optimizer import LowRankOptimizer
from lola_flwr.measured_costs import Example, measure_costs
from lola_flwr.models import fingerprint
from lola_flwr.server_optimizer import ServerOptimizer
from lola_flwr.spread.trainer import SpreadTrainer
from lola_flwr.system.costs import (
    BlockCosts,
    estimate_costs,
    estimate_zeroth_order_costs,
)


def model_costs(
    model: nn.Module,
    partition: BlockPartition,
    *,
    batch_size: int,
    sequence_length: int = 1,
    codec: str = "fp32",
    merged: bool = False,
    micro_batch_size: int = 0,
    example: Example | None = None,
) -> BlockCosts:
    """Estimate each block's costs under a codec, or measure them.

    Parameters
    ----------
    model
        The model.
    partition
        Its layers as blocks, also if ``merged``.
    batch_size, sequence_length, merged, micro_batch_size
        As for ``estimate_costs``.
    codec
        Name of the codec that gradients travel in.
    example
        The model's input for some examples, to measure on as ``measure_costs`` does
        (default: estimate, as ``estimate_costs`` does).

    Raises
    ------
    UserError
        Without an example: the estimate knows no such model.
    """
    if example is not None:
        measured = partition.merged() if merged else partition
        return measure_costs(
            model, measured, example, batch_size=batch_size, codec=codec
        )
    shapes = {name: tuple(values.shape) for name, values in model.named_parameters()}
    if partition.layers:
        # What adapters cost is measured.
        plain = BlockPartition(
            blocks=partition.layers, head=partition.frozen_head, frozen=()
        )
        weights = {name: shapes[name] for name in base_weights(shapes)}
        _refuse_to_estimate(weights, plain, sequence_length)
    else:
        _refuse_to_estimate(shapes, partition, sequence_length)
    buffers = {name: tuple(values.shape) for name, values in model.named_buffers()}
    shapes |= {name: buffers[name] for name in partition.frozen if name in buffers}
    return estimate_costs(
        shapes,
        partition,
        batch_size=batch_size,
        sequence_length=sequence_length,
        dropout_heads=_dropout_heads(model),
        merged=merged,
        micro_batch_size=micro_batch_size,
        adapters=measured_costs(model, partition) if partition.layers else None,
        codec=codec,
    )


def zeroth_order_costs(
    model: nn.Module,
    partition: BlockPartition,
    *,
    batch_size: int,
    sequence_length: int,
    num_directions: int,
) -> BlockCosts:
    """Estimate what blocks cost devices that train by forward passes alone.

    Parameters are those of ``model_costs`` and of ``estimate_zeroth_order_costs``.
    """
    return estimate_zeroth_order_costs(
        {name: tuple(values.shape) for name, values in model.named_parameters()},
        partition,
        batch_size=batch_size,
        sequence_length=sequence_length,
        num_directions=num_directions,
    )


def with_pool(
    costs: BlockCosts,
    model: nn.Module,
    partition: BlockPartition,
    *,
    batch_size: int,
    sequence_length: int,
    pool_factor: int,
) -> BlockCosts:
    """Return costs to which the forward pass over a sampler's pool is added.

    Parameters
    ----------
    costs
        Costs of the blocks without it.
    model, partition, batch_size, sequence_length
        As for `model_costs`.
    pool_factor
        Size of a pool, in mini-batches.
    """
    sizes = {"batch_size": batch_size, "sequence_length": sequence_length}
    # A direction takes two forward passes over a mini-batch.
    one = zeroth_order_costs(model, partition, **sizes, num_directions=1)
    return replace(costs, flops=costs.flops + pool_factor * one.flops[0] / 2)


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


def _refuse_to_estimate(
    shapes: Mapping[str, Sequence[int]],
    partition: BlockPartition,
    sequence_length: int,
) -> None:
    """Refuse models whose costs do not follow from the shapes of their parameters."""
    remedy = (
        "pass example=, the model's input for an example or more, such as "
        "torch.zeros(1, 3, 224, 224), and costs are measured"
    )
    own = set(partition.trainable)
    for name in passed_names(shapes, partition):
        # A single module between the layers, as DeBERTa's convolution, costs little
        # beside them; a layer of another stack does not.
        if name not in own and not re.search(r"\.\d+\.", name):
            continue
        if len(shapes[name]) > 2:
            raise UserError(
                f"What {name} of shape {tuple(shapes[name])} costs depends on the size "
                f"of its input: {remedy}."
            )
        if len(shapes[name]) == 2 and name not in own:
            raise UserError(
                f"Back-propagation passes {name}, which belongs to no block, so that "
                f"its costs are not estimated: {remedy}."
            )
    widths = {_width([shapes[name] for name in block]) for block in partition.blocks}
    if sequence_length > 1 and len(widths) > 1:
        raise UserError(
            f"The blocks have different widths ({', '.join(map(str, sorted(widths)))}),"
            f" and so may have different numbers of tokens: {remedy}."
        )


def _width(shapes: Sequence[Sequence[int]]) -> int:
    return Counter(size for shape in shapes for size in shape).most_common(1)[0][0]


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


def _dropout_heads(model: nn.Module) -> int:
    """Return the attention heads if training drops attention weights out, else 0."""
    config = getattr(model, "config", None)
    drops = getattr(config, "attention_probs_dropout_prob", 0.0) > 0
    return int(getattr(config, "num_attention_heads", 0)) if drops else 0
