"""A reduced schedule for a device whose block is too much for it.

A device of LoLa-DEFT runs all layers forward, and back-propagates from the loss down to
its block. Where that takes too long or too much memory, some layers can do less: those
behind the block forward only (the gradient then passes them on the residual connection
alone) or not at all; those before it not at all. The block itself runs fully, or there
would be nothing to upload.

The gradient that comes out is biased; how much depends on model and moment, so none of
this happens unless it is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lola_flwr.costs.estimated import BlockCosts
from lola_flwr.d2ft.operations import Operation
from lola_flwr.d2ft.schedule import UnitCosts, solve_knapsack
from lola_flwr.errors import UserError

# Of a layer that is not trained: a forward pass, and one for its inputs' gradient. What
# it keeps for the backward pass takes the place of traffic.
_PASSED = UnitCosts(compute=(0, 1, 2), traffic=(0, 0, 1))
_TRAINED = 3


def reduced_schedule(
    num_layers: int,
    block_index: int,
    *,
    compute_budget: int,
    kept_layers: int | None = None,
    forward_worth: Sequence[float] | None = None,
    backward_worth: Sequence[float] | None = None,
) -> tuple[Operation, ...]:
    """Choose what each layer does, of the largest worth within a device's budgets.

    Parameters
    ----------
    num_layers
        Layers L, each of them a block.
    block_index
        Block to train.
    compute_budget
        In forward passes of a layer; all of it is ``L + depth + 1``: every layer
        forward, one more for each layer from the block on, and one for its weights.
    kept_layers
        Layers behind the block that may keep activations (default: all).
    forward_worth, backward_worth
        Worth of each layer's passes, shape [L]. Default: a forward pass 1, a backward
        pass 1/2, as to leave a layer out changes the loss itself; but the last layer's
        backward pass more than all others together. A classifier reads one token, whose
        gradient reaches the others through that layer: without it block 0's gradient
        had a cosine of 0.05 to the exact one (MiniLM-L6), without another layer's
        backward pass 0.86 to 0.91.

    Returns
    -------
    Operation of each layer, shape [L].

    Raises
    ------
    UserError
        Not even the block alone fits.
    """
    forward = np.ones(num_layers) if forward_worth is None else np.array(forward_worth)
    if backward_worth is None:
        backward = np.full(num_layers, 0.5)
        backward[-1] = 2.0 * num_layers
    else:
        backward = np.array(backward_worth)
    values = np.stack([np.zeros(num_layers), forward, forward + backward], axis=1)
    values[:block_index, Operation.FULL] = -np.inf  # nothing flows back that far
    others = np.arange(num_layers) != block_index
    if compute_budget < _TRAINED:
        raise UserError(
            f"compute_budget={compute_budget} forward passes is less than the "
            f"{_TRAINED} that the block itself takes."
        )
    operations = np.full(num_layers, Operation.FULL)
    operations[others] = solve_knapsack(
        values[others],
        _PASSED,
        compute_budget=compute_budget - _TRAINED,
        traffic_budget=kept_layers,
    )
    return tuple(Operation(operation) for operation in operations)


def reduced_costs(
    costs: BlockCosts, block_index: int, operations: Sequence[Operation]
) -> tuple[float, float]:
    """Return operations (FLOP) and bytes of a block's training under a schedule.

    Parameters
    ----------
    costs
        Costs of the model's layers, all of them alike.
    block_index
        Block to train.
    operations
        Operation of each layer.
    """
    if len(operations) < 2:
        return float(costs.flops[0]), float(costs.memory_bytes[0])
    # Neighbouring blocks differ by what one more layer takes on the way back.
    one_pass = float(costs.flops[0] - costs.flops[1])
    one_layer = float(costs.memory_bytes[0] - costs.memory_bytes[1])
    flops, memory_bytes = costs.flops[block_index], costs.memory_bytes[block_index]
    for layer, operation in enumerate(operations):
        if layer == block_index:
            continue
        most = Operation.FULL if layer > block_index else Operation.FORWARD
        flops -= one_pass * (most - min(operation, most))
        memory_bytes -= one_layer * (most == Operation.FULL and operation != most)
    return float(flops), float(memory_bytes)
