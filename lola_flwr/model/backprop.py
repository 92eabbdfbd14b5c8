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

import torch
from torch import Tensor, nn

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
        Some examples of the mini-batch, and the squared norm over these of each block.
    all_examples, all_squares
        All of them, and the squared norms over all.
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
    few_examples: int = 0,
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
    few_examples
        So many examples, drawn at random, are computed first, and of the others half at
        a time at most, so that two squared norms tell the gradient's noise; 0: they are
        not asked for. It takes no memory that micro-batches of half of the mini-batch
        do not.

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
    with (
        only_block_trainable(model, partition, *blocks) as trainable,
        noted_calls(model, trainable) as calls,
    ):
        found = {name: parameter.grad for name, parameter in trainable.items()}
        try:
            for parameter in trainable.values():
                parameter.grad = None
            sums: list[tuple[tuple[float, ...], float]] = []
            for group, size in _groups(batch, micro_batch_size, few_examples):
                for part in split(group, size):
                    share = batch_weight(part) / weight
                    if not share:
                        continue
                    loss = loss_function(model, part) * share
                    _add_gradients(loss, list(trainable.values()))
                    mean_loss += loss.item()
                if few_examples:
                    of_blocks = tuple(
                        _squared_norm(trainable[n] for n in partition.blocks[block])
                        for block in blocks
                    )
                    sums.append((of_blocks, batch_weight(group) / weight))
            missing = [name for name, p in trainable.items() if p.grad is None]
            calls.check(missing)
            for block in blocks:
                require_gradients(f"block {block}", partition.blocks[block], missing)
            gradients = {
                name: torch.zeros_like(p) if p.grad is None else p.grad
                for name, p in trainable.items()
            }
        finally:
            for name, gradient in found.items():
                trainable[name].grad = gradient
    return BlockGradient(
        gradients=gradients,
        loss=mean_loss,
        num_examples=weight,
        squares=_squares(sums, few_examples, num_examples_of(batch)),
    )


def _squares(
    sums: Sequence[tuple[tuple[float, ...], float]],
    few_examples: int,
    num_examples: int,
) -> GradientSquares | None:
    """Return the squares of means, from those of sums and the share of the first."""
    if len(sums) < 2 or not sums[0][1]:
        return None
    (few, share), (whole, _) = sums
    means = tuple(square / share**2 for square in few)
    return GradientSquares(few_examples, means, num_examples, whole)


def _groups(
    batch: Batch, micro_batch_size: int, few_examples: int
) -> Iterator[tuple[Batch, int]]:
    """Give what is computed before squares are taken, and examples at a time."""
    num_examples = num_examples_of(batch)
    if not 0 < few_examples < num_examples:
        yield batch, micro_batch_size
        return
    half = -(-num_examples // 2)
    size = min(micro_batch_size or half, half)
    # Some sources sort what they draw.
    order = torch.randperm(num_examples)
    for rows in (order[:few_examples], order[few_examples:]):
        yield (
            {name: values[rows.to(values.device)] for name, values in batch.items()},
            size,
        )


def _squared_norm(parameters: Iterable[Tensor]) -> float:
    """Return the squared norm of the gradients that parameters have."""
    gradients = (p.grad for p in parameters if p.grad is not None)
    return float(sum(g.float().square().sum().item() for g in gradients))


def _add_gradients(loss: Tensor, trainable: Sequence[Tensor]) -> None:
    """Add each gradient to the sum as soon as it is known."""
    if not loss.requires_grad:
        return
    try:
        torch.autograd.backward(loss, inputs=trainable)
    except RuntimeError as error:
        raise explained(error) from error
