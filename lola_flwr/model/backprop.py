"""Back-propagation from the loss down to one block, and no further.

PyTorch records an operation for the backward pass only where some parameter before it
wants a gradient. With every parameter frozen but those of one block and of the head,
nothing below the block is recorded or kept, the layers above it pass the gradient of
their activations only, and the backward pass ends inside the block: the truncation of
LoLa-DEFT (arXiv:2407.09873, Fig. 2) for any model, with its own forward code.

The gradient of a mini-batch may be computed in micro-batches, one after the other at
the same weights: activations are then kept for one micro-batch only. This is gradient
accumulation, and as many local steps at fixed weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from lola_flwr.arrays import Float64Array
from lola_flwr.errors import UserError
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.model.example_losses import (
    EXAMPLE_WEIGHTS,
    example_losses,
    weighted_mean,
)
from lola_flwr.model.recording import explained, noted_calls, require_gradients
from lola_flwr.model.stored_base import keep_differentiable

Batch = Mapping[str, Tensor]
LossFunction = Callable[[nn.Module, Batch], Tensor]
# How much a batch's mean loss weighs beside those of others.
BatchWeight = Callable[[Batch], int]
# Cuts a mini-batch into micro-batches of so many examples at most (0: of any number).
Split = Callable[[Batch, int], Iterable[Batch]]


@dataclass(frozen=True)
class GradientSquares:
    """Squared norms of the blocks' mean gradients, by which their noise shows.

    Parameters
    ----------
    few_examples, few_squares
        Examples of the largest group that was summed up apart, and what the squared
        norm over so many is, a mean over all groups.
    all_examples, all_squares
        Those of the mini-batch, and the squared norms over all.
    """

    few_examples: int
    few_squares: tuple[float, ...]
    all_examples: int
    all_squares: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class BlockGradient:
    """The mean gradient of one mini-batch.

    Parameters
    ----------
    gradients
        Gradient of each parameter of the blocks and of the head, in the order of
        ``BlockPartition.update_names``; zeros for a parameter that is not used.
    loss
        Mean loss of the mini-batch.
    num_examples
        Weight of the mini-batch: its examples, or whatever its loss is a mean over.
    squares
        Squared norms of each block's part, if they were asked for.
    """

    gradients: dict[str, Tensor]
    loss: float
    num_examples: int
    squares: GradientSquares | None = None


def num_examples_of(batch: Batch) -> int:
    """Return how many examples a batch has."""
    return len(next(iter(batch.values())))


def evenly(batch: Batch, micro_batch_size: int) -> Iterator[Batch]:
    """Cut a mini-batch into pieces of about the same size, and not above the given."""
    num_examples = num_examples_of(batch)
    if not 0 < micro_batch_size < num_examples:
        yield batch
        return
    count = -(-num_examples // micro_batch_size)
    ends = [num_examples * piece // count for piece in range(count + 1)]
    for start, end in pairwise(ends):
        yield {name: tensor[start:end] for name, tensor in batch.items()}


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the loss that a Hugging Face model computes when it is given labels.

    Of a batch that weighs its examples it is the mean of weight times loss, which the
    model has to be a classifier for.
    """
    if EXAMPLE_WEIGHTS in batch:
        return weighted_mean(example_losses(model, batch), batch)
    loss: Tensor = model(**batch).loss
    return loss


def train_mode(model: nn.Module) -> None:
    """Put a model into training mode, but for its running statistics.

    Where gradients travel they belong to the frozen base: layers normalize by them in
    training as the server does in evaluation, and no device changes its own.
    """
    model.train()
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.eval()


class only_trainable:
    """Freeze all parameters but some for the duration of a ``with``.

    Entering gives the trainable parameters by name. On exit every ``requires_grad``
    flag is as it was. (A generator would also restore them when it is collected, at a
    moment of the garbage collector's choice.)

    Parameters
    ----------
    model
        The model.
    names
        Names of the parameters that stay trainable, or become so.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self._parameters = dict(model.named_parameters())
        self._trainable = tuple(names)
        self._flags: dict[str, bool]

    def __enter__(self) -> dict[str, nn.Parameter]:
        self._flags = {name: p.requires_grad for name, p in self._parameters.items()}
        for parameter in self._parameters.values():
            parameter.requires_grad_(False)
        for name in self._trainable:
            self._parameters[name].requires_grad_(True)
        return {name: self._parameters[name] for name in self._trainable}

    def __exit__(self, *_: object) -> None:
        for name, flag in self._flags.items():
            self._parameters[name].requires_grad_(flag)


def only_block_trainable(
    model: nn.Module, partition: BlockPartition, *blocks: int
) -> only_trainable:
    """Freeze everything but some blocks and the head for the duration of a ``with``.

    Parameters
    ----------
    model
        Model whose parameters ``partition`` divides.
    partition
        The model's blocks.
    blocks
        Block to train, 0 nearest the input, or blocks.

    Raises
    ------
    IndexError
        No such block.
    """
    for block_index in blocks:
        if not 0 <= block_index < partition.num_blocks:
            raise IndexError(
                f"block_index={block_index} is not a block of this model; it has "
                f"blocks 0 to {partition.num_blocks - 1}."
            )
    return only_trainable(model, partition.update_names(*blocks))


def block_gradient(
    model: nn.Module,
    partition: BlockPartition,
    blocks: int | Sequence[int],
    batch: Batch,
    *,
    loss_function: LossFunction = model_loss,
    micro_batch_size: int = 0,
    batch_weight: BatchWeight = num_examples_of,
    split: Split = evenly,
    num_groups: int = 1,
) -> BlockGradient:
    """Compute the mean gradient of a block, and of the head, on one mini-batch.

    Of several blocks it takes one backward pass, down to the deepest of them.

    Parameters
    ----------
    model
        Model in the mode (``train`` or ``eval``) that the gradient is wanted in.
    partition
        The model's blocks.
    blocks
        Block to train, 0 nearest the input, or blocks.
    batch
        Arguments of the model; the first dimension of each tensor counts the examples.
    loss_function
        Maps model and batch to a scalar mean loss (default: the model's own).
    micro_batch_size
        Examples that are computed at a time; 0: all of the mini-batch. The result is
        the same to rounding, apart from what dropout draws.
    batch_weight
        What the loss of a batch is a mean over (default: its examples): by this a
        micro-batch weighs.
    split
        Cuts the mini-batch (default: in its own order, without regard to lengths).
    num_groups
        Groups of examples, drawn at random, whose gradients are summed up apart, so
        that squared norms over these and over all tell the gradient's noise; 1: they
        are not asked for. The sum of a group is there beside that of those before it.

    Returns
    -------
    BlockGradient
        Equal, to rounding, to that part of the full model's gradient.

    Raises
    ------
    NoGradient
        A block has none, or PyTorch has not recorded how a parameter was used.
    UserError
        The mini-batch weighs nothing, or bitsandbytes has repacked a layer so that it
        has no gradients.
    """
    blocks = [blocks] if isinstance(blocks, int) else blocks
    weight = batch_weight(batch)
    if not weight:
        raise UserError(
            "The loss of a mini-batch is a mean over nothing: no token of it has a "
            "label; give it examples that have."
        )
    keep_differentiable(model)
    mean_loss = 0.0
    num_examples = num_examples_of(batch)
    num_groups = min(num_groups, num_examples)
    with (
        only_block_trainable(model, partition, *blocks) as trainable,
        noted_calls(model, trainable) as calls,
    ):
        found = {name: parameter.grad for name, parameter in trainable.items()}
        try:
            total: dict[str, Tensor] = {}
            of_groups: list[tuple[int, Float64Array]] = []
            for parameter in trainable.values():
                parameter.grad = None
            for group in _groups(batch, num_groups):
                for part in split(group, micro_batch_size):
                    share = batch_weight(part) / weight
                    if not share:
                        continue
                    loss = loss_function(model, part) * share
                    _add_gradients(loss, list(trainable.values()))
                    mean_loss += loss.item()
                share = batch_weight(group) / weight
                if num_groups > 1 and share:
                    grads = {name: p.grad for name, p in trainable.items()}
                    squares = _squared_norms(grads, partition, blocks) / share**2
                    of_groups.append((num_examples_of(group), squares))
                    del grads
                _move_gradients(trainable, total)
            missing = [name for name in trainable if name not in total]
            calls.check(missing)
            for block in blocks:
                require_gradients(f"block {block}", partition.blocks[block], missing)
            gradients = {
                name: total[name] if name in total else torch.zeros_like(parameter)
                for name, parameter in trainable.items()
            }
        finally:
            for name, gradient in found.items():
                trainable[name].grad = gradient
    found_squares = None
    if len(of_groups) > 1:
        whole = _squared_norms(gradients, partition, blocks)
        found_squares = _squares(of_groups, num_examples, whole)
    return BlockGradient(
        gradients=gradients,
        loss=mean_loss,
        num_examples=weight,
        squares=found_squares,
    )


def _groups(batch: Batch, num_groups: int) -> Iterator[Batch]:
    """Draw so many groups of a mini-batch's examples, of about the same size."""
    if num_groups < 2:
        yield batch
        return
    # Some sources sort what they draw.
    for rows in torch.randperm(num_examples_of(batch)).tensor_split(num_groups):
        yield {name: values[rows.to(values.device)] for name, values in batch.items()}


def _squares(
    of_groups: Sequence[tuple[int, Float64Array]],
    num_examples: int,
    whole: Float64Array,
) -> GradientSquares:
    """Return the squares over the largest group and over all, by those of all groups.

    What noise adds to the square over n examples goes with 1 / n.
    """
    sizes, squares = zip(*of_groups, strict=True)
    few = max(sizes)
    mean_inverse = float(np.mean([1.0 / size for size in sizes]))
    share = (1.0 / few - 1.0 / num_examples) / (mean_inverse - 1.0 / num_examples)
    over_few = whole + share * (np.mean(squares, axis=0) - whole)
    return GradientSquares(
        few, tuple(over_few.tolist()), num_examples, tuple(whole.tolist())
    )


def _squared_norms(
    gradients: Mapping[str, Tensor | None],
    partition: BlockPartition,
    blocks: Sequence[int],
) -> Float64Array:
    """Return the squared norm of each block's gradient, shape [blocks]."""

    def squared_norm(name: str) -> float:
        gradient = gradients[name]
        return 0.0 if gradient is None else gradient.float().square().sum().item()

    return np.array(
        [sum(map(squared_norm, partition.blocks[block])) for block in blocks]
    )


def _move_gradients(parameters: Mapping[str, Tensor], total: dict[str, Tensor]) -> None:
    """Add the gradients that parameters have to a sum, in place; these have none then.

    The first becomes the sum itself: of a single group there is no copy.
    """
    for name, parameter in parameters.items():
        if parameter.grad is None:
            continue
        if name in total:
            total[name] += parameter.grad
        else:
            total[name] = parameter.grad
        parameter.grad = None


def _add_gradients(loss: Tensor, trainable: Sequence[Tensor]) -> None:
    """Add each gradient to the sum as soon as it is known."""
    if not loss.requires_grad:
        return
    try:
        torch.autograd.backward(loss, inputs=trainable)
    except RuntimeError as error:
        raise explained(error) from error
