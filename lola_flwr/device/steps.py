"""The three ways to compute what an assignment asks for, on one mini-batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lola_flwr.d2ft.operations import from_text
from lola_flwr.d2ft.training import reduced_gradient
from lola_flwr.model.backprop import (
    Batch,
    BatchWeight,
    BlockGradient,
    GradientSquares,
    LossFunction,
    Split,
    block_gradient,
)
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.system.gradient_noise import NUM_GROUPS
from lola_flwr.wire.records import SQUARES_TYPE, Assignment
from lola_flwr.zeroth_order.directions import directions_of
from lola_flwr.zeroth_order.forward_mode import directional_derivatives
from lola_flwr.zeroth_order.projections import projected_gradients


@dataclass(frozen=True, kw_only=True, eq=False)
class StepResult:
    """What a step has found.

    Parameters
    ----------
    loss
        Mean loss of the mini-batch.
    num_examples
        Its weight: its examples, or whatever its loss is a mean over.
    gradients
        Mean gradient of each parameter of the block and of the head; none where
        projections take their place.
    projections
        Of the gradient, on the directions that the assignment names; shape [count].
    squares
        Squared norms of the gradient, where it was asked for them.
    example_tokens
        Tokens that were computed for an example, on average; None where no mask tells.
    """

    loss: float
    num_examples: int
    gradients: Mapping[str, Tensor] | None = None
    projections: npt.NDArray[np.float32] | None = None
    squares: GradientSquares | None = None
    example_tokens: float | None = None


class Step(Protocol):
    """Computes what an assignment asks for; the arguments are those of a device."""

    def __call__(
        self,
        model: nn.Module,
        partition: BlockPartition,
        assignment: Assignment,
        batch: Batch,
        *,
        loss_function: LossFunction,
        micro_batch_size: int,
        batch_weight: BatchWeight,
        split: Split,
    ) -> StepResult:
        """Run the step."""


def step_for(assignment: Assignment, *, tells_noise: bool = True) -> Step:
    """Return the step that an assignment asks for.

    Parameters
    ----------
    assignment
        What the server asks for.
    tells_noise
        Whether the memory holds the sums of gradients by which their noise is told, if
        the server asks for that.
    """
    if assignment.direction_seed is not None:
        return forward_passes_alone
    if assignment.operations is not None:
        return under_a_schedule
    tells_noise &= bool(assignment.measures_noise)
    return partial(down_to_the_block, num_groups=NUM_GROUPS if tells_noise else 1)


def squares_fields(squares: GradientSquares) -> dict[str, Any]:
    """Return a report's fields that tell squared norms.

    Those of further blocks are in one array: over few examples, then over all.
    """
    few, *further_few = squares.few_squares
    all_, *further_all = squares.all_squares
    further = np.array([further_few, further_all], SQUARES_TYPE)
    return {
        "few_examples": squares.few_examples,
        "few_square": few,
        "all_examples": squares.all_examples,
        "all_square": all_,
        "further_squares": further.tobytes() or None,
    }


def down_to_the_block(
    model: nn.Module,
    partition: BlockPartition,
    assignment: Assignment,
    batch: Batch,
    *,
    loss_function: LossFunction,
    micro_batch_size: int,
    batch_weight: BatchWeight,
    split: Split,
    num_groups: int = 1,
) -> StepResult:
    """Back-propagate from the loss down to the block: the gradient itself.

    Of several blocks, it is one pass down to the first. In several groups, its noise
    is looked at, too, as `block_gradient` does.
    """
    return _of(
        block_gradient(
            model,
            partition,
            assignment.blocks,
            batch,
            loss_function=loss_function,
            micro_batch_size=micro_batch_size,
            batch_weight=batch_weight,
            split=split,
            num_groups=num_groups,
        )
    )


def under_a_schedule(
    model: nn.Module,
    partition: BlockPartition,
    assignment: Assignment,
    batch: Batch,
    *,
    loss_function: LossFunction,
    micro_batch_size: int,
    batch_weight: BatchWeight,
    split: Split,
) -> StepResult:
    """Run some layers forward only, or not at all: a biased gradient."""
    return _of(
        reduced_gradient(
            model,
            partition,
            assignment.block_index,
            batch,
            operations=from_text(assignment.operations or ""),
            loss_function=loss_function,
            micro_batch_size=micro_batch_size,
            batch_weight=batch_weight,
            split=split,
        )
    )


def forward_passes_alone(
    model: nn.Module,
    partition: BlockPartition,
    assignment: Assignment,
    batch: Batch,
    *,
    loss_function: LossFunction,
    micro_batch_size: int,
    batch_weight: BatchWeight,
    split: Split,
) -> StepResult:
    """Measure the gradient's projections on directions that the server draws, too.

    Memory asks for no micro-batches: nothing is kept for a backward pass.
    """
    weight = batch_weight(batch)
    weighed = [(part, batch_weight(part)) for part in split(batch, 0)]

    def mean_loss(model: nn.Module, _: Batch) -> Tensor:
        losses = [loss_function(model, part) * (w / weight) for part, w in weighed if w]
        return torch.stack(losses).sum()

    directions = directions_of(assignment)
    moves = directions.perturbation > 0
    project = projected_gradients if moves else directional_derivatives
    projections, loss = project(
        model,
        partition.update_names(*assignment.blocks, head=assignment.sends_head),
        batch,
        directions=directions,
        loss_function=mean_loss if len(weighed) > 1 else loss_function,
    )
    return StepResult(loss=loss, num_examples=weight, projections=projections)


def _of(found: BlockGradient) -> StepResult:
    return StepResult(
        loss=found.loss,
        num_examples=found.num_examples,
        gradients=found.gradients,
        squares=found.squares,
    )
