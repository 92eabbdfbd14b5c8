"""What the blocks of a model cost: estimated from it, or measured on an example."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from lola_flwr.costs.adapters import measured_costs
from lola_flwr.costs.dropout import dropped_heads
from lola_flwr.costs.estimated import (
    BlockCosts,
    CostsNotEstimated,
    estimate_costs,
    estimate_zeroth_order_costs,
)
from lola_flwr.costs.measured import measure_costs
from lola_flwr.errors import UserError
from lola_flwr.model.adapter_blocks import base_weights
from lola_flwr.model.blocks import BlockPartition, passed_names
from lola_flwr.model.trace import Example

_REMEDY = (
    "pass example=, the model's input for an example or more, such as "
    "torch.zeros(1, 3, 224, 224), and costs are measured"
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
    CostsNotEstimated
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
        _refuse_frozen_layers(model, partition)
    buffers = {name: tuple(values.shape) for name, values in model.named_buffers()}
    shapes |= {name: buffers[name] for name in partition.frozen if name in buffers}
    return estimate_costs(
        shapes,
        partition,
        batch_size=batch_size,
        sequence_length=sequence_length,
        dropout_heads=dropped_heads(model) if sequence_length > 1 else 0,
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


def _refuse_frozen_layers(model: nn.Module, partition: BlockPartition) -> None:
    """Refuse layers that run and are no blocks, since the project has frozen them."""
    frozen = set(partition.frozen)
    for name, parameter in model.named_parameters():
        matrix_of_a_layer = parameter.ndim > 1 and re.search(r"(^|\.)\d+\.", name)
        if name in frozen and matrix_of_a_layer and not parameter.requires_grad:
            raise UserError(
                f"{name} is frozen (requires_grad=False), and what its layer costs is "
                f"not estimated: {_REMEDY}."
            )


def _refuse_to_estimate(
    shapes: Mapping[str, Sequence[int]],
    partition: BlockPartition,
    sequence_length: int,
) -> None:
    """Refuse models whose costs do not follow from the shapes of their parameters."""
    own = set(partition.trainable)
    for name in passed_names(shapes, partition):
        # A single module between the layers, as DeBERTa's convolution, costs little
        # beside them; a layer of another stack does not.
        if name not in own and not re.search(r"\.\d+\.", name):
            continue
        if len(shapes[name]) > 2:
            raise CostsNotEstimated(
                f"What {name} of shape {tuple(shapes[name])} costs depends on the size "
                f"of its input: {_REMEDY}."
            )
        if len(shapes[name]) == 2 and name not in own:
            raise CostsNotEstimated(
                f"Back-propagation passes {name}, which belongs to no block, so that "
                f"its costs are not estimated: {_REMEDY}."
            )
    widths = {_width([shapes[name] for name in block]) for block in partition.blocks}
    if sequence_length > 1 and len(widths) > 1:
        raise CostsNotEstimated(
            f"The blocks have different widths ({', '.join(map(str, sorted(widths)))}),"
            f" and so may have different numbers of tokens: {_REMEDY}."
        )


def _width(shapes: Sequence[Sequence[int]]) -> int:
    return Counter(size for shape in shapes for size in shape).most_common(1)[0][0]
