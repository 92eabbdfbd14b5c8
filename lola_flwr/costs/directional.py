"""What derivatives along directions take, counted on the model."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from lola_flwr.arrays import Float64Array
from lola_flwr.costs.counter import Counter, Pass, TwoPasses, at_batch
from lola_flwr.costs.runnable import Runnable, batch_of, fill, loss_on
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.model.stored_base import evaluation_mode
from lola_flwr.zeroth_order.forward_mode import AT_A_TIME, derivatives_along


def forward_mode_counts(
    runnable: Runnable, partition: BlockPartition, batch_size: int, num_directions: int
) -> Float64Array:
    """Count the passes that carry derivatives along some directions.

    Parameters
    ----------
    runnable
        The model.
    partition
        Its blocks.
    batch_size
        Examples of a mini-batch.
    num_directions
        Directions, which go through the model some at a time.

    Returns
    -------
    Operations, and bytes at the peak besides weights, of each block, shape [N, 2].
    """
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
