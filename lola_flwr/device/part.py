"""What a device computes where the model is spread over devices.

A step of D2FT takes many exchanges. The owners of the micro-batches give what the first
layer is given; every branch of every layer is an exchange with the devices that hold
its sub-networks, and on the way back another one; between the two, the owners turn what
the last layer gave into a loss, so that labels stay where they are.

A device keeps nothing from one message to the next: it is sent the values of its
sub-networks, and on the way back it computes forward anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lola_flwr.d2ft.branches import Context, contribute
from lola_flwr.d2ft.contexts import contexts_from_mask, layer_inputs, token_mask
from lola_flwr.d2ft.execution import LayerFunction, replaced_layers
from lola_flwr.d2ft.find import find_subnetworks
from lola_flwr.d2ft.operations import Operation, from_text
from lola_flwr.d2ft.subnetworks import Branch, Slice, Subnetworks, hidden_size
from lola_flwr.d2ft.wire import (
    HIDDEN,
    MASKS,
    SLOPES,
    array_of,
    numbers_to_text,
    part_slices,
    sizes_from_text,
    sizes_to_text,
    tensors_of,
)
from lola_flwr.errors import UserError
from lola_flwr.model.backprop import (
    Batch,
    BatchWeight,
    LossFunction,
    num_examples_of,
    only_trainable,
)
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.model.recording import ADVICE, NoGradient
from lola_flwr.randomness import rng_for
from lola_flwr.wire.packing import GRADIENTS, VALUES
from lola_flwr.wire.records import MalformedRecord, PartReport, PartTask

Arrays = Mapping[str, npt.NDArray[Any]]


# What a device sends back: what the arrays are, and the arrays.
PartResult = tuple[PartReport, dict[str, npt.NDArray[Any]]]


def compute_part(
    model: nn.Module,
    partition: BlockPartition,
    task: PartTask,
    arrays: Arrays,
    *,
    draw: Callable[[int, int], Batch],
    loss_function: LossFunction,
    batch_weight: BatchWeight = num_examples_of,
) -> PartResult:
    """Do what a task asks for.

    Parameters
    ----------
    model
        The device's model, in training mode. Its trainable values are overwritten.
    partition
        Its blocks.
    task
        The task.
    arrays
        What came with it.
    draw
        Gives a micro-batch: (number, examples) -> arguments of the model.
    loss_function
        Maps model and micro-batch to a mean loss.
    batch_weight
        What that loss is a mean over (default: examples).

    Returns
    -------
    What the arrays are that go back, and these arrays.

    Raises
    ------
    MalformedRecord
        This is no such task.
    UserError
        The arrays are not those of this model.
    """
    compute = {
        "inputs": _inputs,
        "forward": _forward,
        "backward": _backward,
        "loss": _loss,
    }.get(task.kind)
    if compute is None:
        raise MalformedRecord(f"kind={task.kind!r} is no part of a step.")
    part = _Part(
        model,
        partition,
        find_subnetworks(model, partition, num_groups=task.num_groups),
        task,
        arrays,
        draw,
        loss_function,
        batch_weight,
    )
    return compute(part)


@dataclass(frozen=True, eq=False)
class _Part:
    """A task, and what it takes to do it."""

    model: nn.Module
    partition: BlockPartition
    subnetworks: Subnetworks
    task: PartTask
    arrays: Arrays
    draw: Callable[[int, int], Batch]
    loss_function: LossFunction
    batch_weight: BatchWeight

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def sizes(self) -> list[tuple[int, int]]:
        return sizes_from_text(self.task.sizes)

    @property
    def numbers(self) -> list[int]:
        return [int(number) for number in self.task.numbers.split()]

    def batches(self) -> list[Batch]:
        return [
            {
                name: tensor.to(self.device)
                for name, tensor in self.draw(number, self.task.batch_size).items()
            }
            for number in self.numbers
        ]

    def hidden(self, name: str) -> list[Tensor]:
        width = hidden_size(self.subnetworks)
        shapes = [(*size, width) for size in self.sizes]
        return [t.to(self.device) for t in tensors_of(self.arrays[name], shapes)]

    def restart_dropout(self, number: int) -> None:
        """Let dropout be the same on both ways of a micro-batch through here."""
        task = self.task
        place: tuple[str | int, ...] = (task.kind,)
        if task.kind in ("forward", "backward"):
            place = (task.layer_index, task.branch_index, task.first_group)
        rng = rng_for(task.seed, "part", *place, "micro-batch", number)
        torch.manual_seed(int(rng.integers(2**63)))

    def report(self, **fields: Any) -> PartReport:
        task = self.task
        return PartReport(
            kind=task.kind,
            step=task.step,
            layer_index=task.layer_index,
            branch_index=task.branch_index,
            **fields,
        )


# --- the owners of the micro-batches --------------------------------------------------


def _inputs(part: _Part) -> PartResult:
    inputs, masks = [], []
    batches = part.batches()
    for number, batch in zip(part.numbers, batches, strict=True):
        part.restart_dropout(number)
        hidden, told = layer_inputs(
            part.subnetworks,
            partial(part.loss_function, part.model, batch),
            num_layers=part.subnetworks.num_layers,
        )
        inputs.append(hidden)
        given = batch.get("attention_mask")
        masks.append(token_mask(part.model, part.subnetworks, told, hidden, given))
    return part.report(sizes=sizes_to_text(inputs), digest=_digest(batches)), {
        HIDDEN: array_of(inputs),
        MASKS: array_of(masks).astype(np.uint8),
    }


def _digest(batches: Sequence[Batch]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            digest.update(f"{name} {tuple(batch[name].shape)}".encode())
            digest.update(batch[name].contiguous().numpy(force=True).tobytes())
    return digest.hexdigest()[:32]


@torch.enable_grad()
def _loss(part: _Part) -> PartResult:
    first, *others = part.subnetworks.layers
    head = [part.parameters[name] for name in part.partition.head]
    _load(head, part.arrays[VALUES])
    losses: list[float] = []
    slopes: list[Tensor] = []
    total = [torch.zeros_like(parameter) for parameter in head]
    batches = part.batches()
    if _digest(batches) != part.task.digest:
        raise UserError(
            f"The micro-batches {part.task.numbers} are others than a moment ago: "
            "batch_source must give the same batch whenever it is asked for the same "
            "number, as it is twice a step."
        )
    weights = [part.batch_weight(batch) for batch in batches]
    with only_trainable(part.model, part.partition.head):
        for number, batch, hidden, weight in zip(
            part.numbers, batches, part.hidden(HIDDEN), weights, strict=True
        ):
            if not weight:  # a mean over nothing
                losses.append(0.0)
                slopes.append(torch.zeros_like(hidden))
                continue
            part.restart_dropout(number)
            with replaced_layers(
                {
                    first: _giving(hidden.requires_grad_()),
                    **dict.fromkeys(others, _passing),
                }
            ):
                loss = part.loss_function(part.model, batch)
            slope, *found = torch.autograd.grad(
                loss, [hidden, *head], allow_unused=True
            )
            if slope is None:
                raise NoGradient(
                    "The loss does not depend on what the last layer gives, as far as "
                    f"PyTorch has recorded; {ADVICE}."
                )
            losses.append(loss.item())
            slopes.append(slope)
            for sum_, gradient in zip(total, found, strict=True):
                if gradient is not None:
                    sum_ += gradient * (weight / sum(weights))
    report = part.report(
        losses=np.array(losses, "<f4").tobytes(), weights=numbers_to_text(weights)
    )
    return report, {SLOPES: array_of(slopes), GRADIENTS: array_of(total)}


def _giving(hidden: Tensor) -> LayerFunction:
    return lambda *_: hidden


def _passing(hidden: Tensor, _: Context) -> Tensor:
    return hidden


# --- the holders of the sub-networks --------------------------------------------------


def _forward(part: _Part) -> PartResult:
    _, tensors = _held(part)
    _load(tensors, part.arrays[VALUES])
    with torch.no_grad():
        outputs = [
            _contribution(part, m, hidden)
            for m, hidden in enumerate(part.hidden(HIDDEN))
        ]
    return part.report(), {HIDDEN: array_of(outputs)}


@torch.enable_grad()
def _backward(part: _Part) -> PartResult:
    slices, tensors = _held(part)
    _load(tensors, part.arrays[VALUES])
    named = part.parameters
    names = list(dict.fromkeys(piece.name for piece in slices))
    wanted = [named[name] for name in names]
    totals = {name: torch.zeros_like(named[name]) for name in names}
    slopes: list[Tensor] = []
    with only_trainable(part.model, names):
        for m, (hidden, slope) in enumerate(
            zip(part.hidden(HIDDEN), part.hidden(SLOPES), strict=True)
        ):
            hidden.requires_grad_(part.task.wants_inputs)
            output = _contribution(part, m, hidden)
            inputs = [hidden] * part.task.wants_inputs
            found = torch.autograd.grad(
                output,
                [*inputs, *wanted],
                slope,
                allow_unused=True,
                materialize_grads=True,
            )
            slopes += found[: len(inputs)]
            for name, gradient in zip(names, found[len(inputs) :], strict=True):
                totals[name] += gradient
    arrays: dict[str, npt.NDArray[Any]] = {}
    if slices:
        arrays[GRADIENTS] = array_of([piece.of(totals[piece.name]) for piece in slices])
    if slopes:
        arrays[SLOPES] = array_of(slopes)
    return part.report(), arrays


def _contribution(part: _Part, m: int, hidden: Tensor) -> Tensor:
    """Compute what the device's groups contribute in the message's m-th."""
    task = part.task
    parts = part.subnetworks.layers[task.layer_index]
    others = part.subnetworks.num_groups - task.last_group
    row = [
        *[Operation.SKIP] * task.first_group,
        *from_text(task.rows.split()[m]),
        *[Operation.SKIP] * others,
    ]
    lengths = [batch * tokens for batch, tokens in part.sizes]
    start = sum(lengths[:m])
    mask = torch.from_numpy(part.arrays[MASKS][start : start + lengths[m]] != 0)
    *_, context = contexts_from_mask(
        part.model,
        part.subnetworks,
        mask.view(len(hidden), -1).to(part.device),
        num_layers=task.layer_index + 1,
    )
    part.restart_dropout(part.numbers[m])
    return contribute(parts, Branch(task.branch_index), row, hidden, context)


def _held(part: _Part) -> tuple[list[Slice], list[Tensor]]:
    """Return the values that a branch's task comes with: what of which parameter."""
    task = part.task
    names = {id(parameter): name for name, parameter in part.parameters.items()}
    slices = part_slices(
        names,
        part.subnetworks.layers[task.layer_index],
        Branch(task.branch_index),
        task.first_group,
        task.last_group,
        part.partition.trainable,
    )
    return slices, [piece.of(part.parameters[piece.name]) for piece in slices]


def _load(tensors: Sequence[Tensor], values: npt.NDArray[Any]) -> None:
    received = tensors_of(values, [tuple(tensor.shape) for tensor in tensors])
    with torch.no_grad():
        for tensor, value in zip(tensors, received, strict=True):
            tensor.copy_(value)
