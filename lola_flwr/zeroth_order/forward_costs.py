"""What derivatives along directions take, counted on the model."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import nn

from lola_flwr.arrays import Float64Array
from lola_flwr.costs.counted import counted
from lola_flwr.costs.counter import Counter, Pass, TwoPasses, at_batch
from lola_flwr.costs.estimated import BlockCosts
from lola_flwr.costs.examples import training_example
from lola_flwr.costs.runnable import Runnable, batch_of, fill, loss_on
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.model.stored_base import evaluation_mode
from lola_flwr.model.trace import Example
from lola_flwr.wire.payload import projections_bytes
from lola_flwr.zeroth_order.forward_mode import AT_A_TIME, derivatives_along


def forward_mode_costs(
    model: nn.Module,
    partition: BlockPartition,
    *,
    batch_size: int,
    sequence_length: int,
    num_directions: int,
    example: Example | None = None,
) -> BlockCosts:
    """Count what each block costs a device that computes derivatives along directions.

    Parameters
    ----------
    model, partition, batch_size, sequence_length, example
        As for `lola_flwr.costs.of_model.model_costs`.
    num_directions
        Directions of a mini-batch.

    Returns
    -------
    Costs that are the higher the deeper the block: the passes, which carry some
    directions each, and what they take beside the weights; a number a direction.

    Raises
    ------
    UserError
        As for `model_costs`; or the model has no forward-mode derivative.
    """
    example = training_example(model, sequence_length) if example is None else example
    table, held_bytes = counted(
        model,
        example,
        lambda m: (_counts(m, partition, batch_size, num_directions), m.held_bytes()),
    )
    bits = 8.0 * projections_bytes(num_directions)
    return BlockCosts(
        flops=table[:, 0],
        memory_bytes=held_bytes + table[:, 1],
        payload_bits=np.full(partition.num_blocks, bits),
        gradient_bytes=np.zeros(partition.num_blocks),
    )


def _counts(
    runnable: Runnable, partition: BlockPartition, batch_size: int, num_directions: int
) -> Float64Array:
    """Return operations and bytes at the peak besides weights, shape [N, 2]."""
    modes = {module: module.training for module in runnable.model.modules()}
    evaluation_mode(runnable.model)
    whole, rest = divmod(num_directions, AT_A_TIME)
    rows: dict[int, Float64Array] = {}

    def row(block: int) -> Float64Array:
        if block not in rows:
            flops, peak_bytes = 0.0, 0.0
            for times, size in ((whole, AT_A_TIME), (1, rest)):
                if times and size:
                    done = _passes(runnable, partition, block, size)
                    flops += times * float(at_batch(done.flops, batch_size))
                    peak_bytes = max(peak_bytes, done.peak_bytes(batch_size))
            rows[block] = np.array([flops, peak_bytes])
        return rows[block]

    try:
        fill(rows, row, 0, partition.num_blocks - 1)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return np.array([rows[block] for block in range(partition.num_blocks)])


def _passes(
    runnable: Runnable, partition: BlockPartition, block: int, size: int
) -> Pass | TwoPasses:
    model = runnable.model
    passes = []
    for example in runnable.examples:
        counter = Counter(runnable.owners(partition), runnable.batch)
        counter.tracing = False
        batch = batch_of(example)
        with counter:
            counter.note(v for v in batch.values() if isinstance(v, torch.Tensor))
            tangents = {
                name: model.get_parameter(name).new_zeros(
                    (size, *model.get_parameter(name).shape)
                )
                for name in partition.update_names(block)
            }
            derivatives_along(model, tangents, partial(loss_on, batch=batch))
        passes.append(counter.result())
    return passes[0] if len(passes) == 1 else TwoPasses(*passes)
