"""A model's layers on the server, whose sub-networks other machines compute.

What devices contribute to a branch is one function in autograd's graph: on the way
forward its call is an exchange with the devices, on the way back another one. All
micro-batches go through it together. Normalisations, biases and dropout, which belong
to a layer as a whole, are the server's own. Gradients of what a device holds alone stay
there; the server is told how large they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lola_flwr.arrays import Float64Array, IntArray
from lola_flwr.d2ft.branches import enter, leave
from lola_flwr.d2ft.operations import Operation
from lola_flwr.d2ft.subnetworks import Branch
from lola_flwr.model.backprop import only_trainable
from lola_flwr.server.spread.audit import Recompute
from lola_flwr.server.spread.branch import Found, RemoteBranch
from lola_flwr.server.spread.exchange import PartFailed
from lola_flwr.server.spread.losses import LossLimits
from lola_flwr.server.spread.model import SpreadModel
from lola_flwr.server.spread.owners import MicroBatch, draw_micro_batches, losses_of
from lola_flwr.server.spread.places import Place


@dataclass(frozen=True, eq=False)
class SpreadGradient:
    """The gradient of one step.

    Parameters
    ----------
    gradients
        Gradient of the mean loss over all examples, by name of the parameter: of what
        the server steps.
    squares, magnitudes, places
        Of the rest, as in `Found`.
    loss
        That loss.
    tokens
        Tokens of each micro-batch, padding included.
    limits
        How long gradients of losses may be after this one.
    """

    gradients: dict[str, Tensor]
    squares: Float64Array
    magnitudes: Float64Array
    places: set[Place]
    loss: float
    tokens: list[int]
    limits: LossLimits

    def scale(self, max_norm: float) -> float:
        """Return what scales it down to a Euclidean norm, if it is larger.

        Raises
        ------
        PartFailed
            It is not finite.
        """
        own = sum(float(g.double().square().sum()) for g in self.gradients.values())
        norm = math.sqrt(own + float(self.squares.sum()))
        if not math.isfinite(norm):
            raise PartFailed({}, "the gradient is not finite")
        return min(1.0, max_norm / norm) if norm else 1.0


def run_layers(
    spread: SpreadModel,
    micro_batches: Sequence[MicroBatch],
    operations: IntArray,
    found: Found,
) -> tuple[list[Tensor], Tensor]:
    """Run all layers under a schedule.

    Parameters
    ----------
    spread
        The model.
    micro_batches
        M micro-batches.
    operations
        What each sub-network does in each of them, shape [S, M].
    found
        What the devices find on the way back is added to this.

    Returns
    -------
    What the last layer gave for each micro-batch, and a leaf that all of it depends
    on: its gradient has to be asked for, or devices are not asked for theirs.
    """
    # Autograd goes back only to what wants a gradient, and the devices' parameters
    # are no tensors here.
    anchor = torch.zeros((), requires_grad=True)
    hidden = [one.hidden for one in micro_batches]
    shape = (spread.subnetworks.num_layers, spread.subnetworks.num_groups, -1)
    table = operations.reshape(shape)
    for index, parts in enumerate(spread.subnetworks.layers):
        rows = {
            m: tuple(Operation(o) for o in table[index, :, m])
            for m in range(len(hidden))
            if (table[index, :, m] != Operation.SKIP).any()
        }
        if not rows:
            continue
        for branch in Branch:
            remote = RemoteBranch(
                spread,
                index,
                branch,
                [*rows.values()],
                [micro_batches[m] for m in rows],
                found,
            )
            entered = [enter(parts, branch, rows[m], hidden[m]) for m in rows]
            start = anchor if remote.is_trained else anchor.detach()
            totals = _Contributions.apply(  # type: ignore[no-untyped-call]
                remote, start, *entered
            )
            for m, total in zip(rows, totals, strict=True):
                hidden[m] = leave(parts, branch, rows[m], hidden[m], total)
    return hidden, anchor


def spread_gradient(
    spread: SpreadModel,
    numbers: Mapping[str, Sequence[int]],
    batch_size: int,
    operations: IntArray,
    *,
    max_tokens: int = 512,
    example_weight: int = 1,
    limits: LossLimits | None = None,
    compute: Recompute | None = None,
) -> SpreadGradient:
    """Compute the gradient of some micro-batches, which devices draw, under a schedule.

    What `lola_flwr.d2ft.training.scheduled_gradient` computes in one process.

    Parameters
    ----------
    spread
        The model, in training mode or not.
    numbers
        Numbers of the micro-batches that each device is to draw, M in all.
    batch_size
        Examples of a micro-batch.
    operations
        What each sub-network does in each of them, in the order of their numbers, shape
        [S, M].
    max_tokens, example_weight
        Tokens that an example may have, and what it weighs at most.
    limits
        How long gradients of losses may be (default: as where none came before).
    compute
        As for `losses_of`.

    Raises
    ------
    PartFailed
        A device did not do its part.
    """
    parameters = spread.parameters
    names = spread.held.own_names
    found = Found(
        {name: torch.zeros_like(parameters[name]) for name in names},
        np.zeros(spread.subnetworks.count),
        np.zeros(spread.subnetworks.count),
    )
    gradients = found.gradients
    with only_trainable(spread.model, names):
        micro_batches = draw_micro_batches(spread, numbers, batch_size, max_tokens)
        outputs, anchor = run_layers(spread, micro_batches, operations, found)
        losses = losses_of(
            spread,
            micro_batches,
            batch_size,
            outputs,
            limits or LossLimits(),
            example_weight=example_weight,
            compute=compute,
        )
        trained = [m for m, output in enumerate(outputs) if output.requires_grad]
        if trained:
            _, *own = torch.autograd.grad(
                [outputs[m] for m in trained],
                [anchor, *(parameters[name] for name in names)],
                [losses.slopes[m] for m in trained],
                allow_unused=True,
            )
            for name, gradient in zip(names, own, strict=True):
                if gradient is not None:
                    gradients[name] += gradient
    return SpreadGradient(
        gradients={**gradients, **losses.head},
        squares=found.squares,
        magnitudes=found.magnitudes,
        places=found.places,
        loss=losses.mean,
        tokens=[one.mask.numel() for one in micro_batches],
        limits=losses.limits,
    )


class _Contributions(torch.autograd.Function):
    """Sums of what devices contribute to a branch, for some micro-batches."""

    @staticmethod
    def forward(
        ctx: Any, remote: RemoteBranch, anchor: Tensor, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.remote = remote
        ctx.save_for_backward(*inputs)
        outputs = remote.forward(inputs)
        ctx.mark_non_differentiable(
            *(
                output
                for output, row in zip(outputs, remote.rows, strict=True)
                if Operation.FULL not in row
            )
        )
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        found = ctx.remote.backward(
            ctx.saved_tensors, slopes, wants_inputs=any(ctx.needs_input_grad[2:])
        )
        return (None, None, *found)
