"""A model's layers on the server, whose sub-networks other machines compute.

What devices contribute to a branch is one function in autograd's graph: on the way
forward its call is an exchange with the devices, on the way back another one. All
micro-batches go through it together. Normalisations, biases and dropout, which belong
to a layer as a whole, are the server's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lola_flwr.blocks import BlockPartition
from lola_flwr.codec import MalformedArray, read_npy
from lola_flwr.d2ft.branches import enter, leave
from lola_flwr.d2ft.operations import Operation, to_text
from lola_flwr.d2ft.parts import (
    HIDDEN,
    MASKS,
    SLOPES,
    array_of,
    hidden_size,
    part_slices,
    sizes_from_text,
    tensors_of,
)
from lola_flwr.d2ft.subnetworks import Branch, Slice, Subnetworks
from lola_flwr.errors import quoted
from lola_flwr.packed import GRADIENTS, VALUES
from lola_flwr.protocol import MalformedRecord, PartReport, PartTask

IntArray = npt.NDArray[np.int64]


class PartFailed(Exception):
    """A device did not do its part of a step.

    Parameters
    ----------
    device_id
        The device.
    reason
        What went wrong.
    """

    def __init__(self, device_id: str, reason: str) -> None:
        super().__init__(f"{device_id}: {reason}")
        self.device_id = device_id
        self.reason = reason


@dataclass(frozen=True, eq=False)
class PartRequest:
    """What one device is asked in an exchange."""

    task: PartTask
    arrays: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class PartReply:
    """What it sends back, unchecked: arrays in .npy format, and a flat record."""

    arrays: Mapping[str, bytes]
    report: Mapping[str, object]


class Draw(NamedTuple):
    """A micro-batch, by its number, and the device that draws it."""

    device_id: str
    number: int


# Sends requests, by device id, and returns the replies; `PartFailed` if one is missing.
Exchange = Callable[[Mapping[str, PartRequest]], Mapping[str, PartReply]]


@dataclass(frozen=True, kw_only=True, eq=False)
class SpreadModel:
    """A model and the devices that its sub-networks are on.

    Parameters
    ----------
    model
        The server's own model; its trainable values are those to compute with.
    partition
        Its blocks.
    subnetworks
        Its sub-networks.
    device_of
        Number of each sub-network's device, shape [S].
    device_ids
        The devices' ids, by number.
    exchange
        How they are asked.
    task
        Fields that all tasks of the step have in common.
    """

    model: nn.Module
    partition: BlockPartition
    subnetworks: Subnetworks
    device_of: IntArray
    device_ids: Sequence[str]
    exchange: Exchange
    task: Mapping[str, Any]

    # --- what the owners of the micro-batches do -------------------------------------

    def inputs(self, draws: Sequence[Draw], batch_size: int) -> MicroBatches:
        """Have micro-batches drawn; return what the first layer is given for each.

        Parameters
        ----------
        draws
            Who is to draw which.
        batch_size
            Examples of a micro-batch.
        """
        hidden: dict[Draw, Tensor] = {}
        masks: dict[Draw, Tensor] = {}
        mine = _by_device(draws)
        replies = self.ask(
            {
                device: PartRequest(
                    self.task_for(
                        "inputs", draws=_numbers(drawn), batch_size=batch_size
                    )
                )
                for device, drawn in mine.items()
            }
        )
        for device, reply in replies.items():
            sizes = reply.sizes(len(mine[device]), batch_size)
            shapes = [(*size, hidden_size(self.subnetworks)) for size in sizes]
            found = reply.tensors(HIDDEN, shapes)
            hidden |= dict(zip(mine[device], found, strict=True))
            found = reply.tensors(MASKS, sizes, np.dtype("u1"))
            masks |= dict(zip(mine[device], found, strict=True))
        return MicroBatches([hidden[d] for d in draws], [masks[d] for d in draws])

    def losses(
        self, draws: Sequence[Draw], batch_size: int, outputs: Sequence[Tensor]
    ) -> Losses:
        """Have the owners turn what the last layer gave into a loss.

        Parameters
        ----------
        draws, batch_size
            As for `inputs`.
        outputs
            What the last layer gave for each micro-batch.
        """
        parameters = dict(self.model.named_parameters())
        head = {name: parameters[name] for name in self.partition.head}
        values = array_of([*head.values()])
        mine = _by_device(draws)
        output_of = dict(zip(draws, outputs, strict=True))
        given = {d: [output_of[draw] for draw in drawn] for d, drawn in mine.items()}
        replies = self.ask(
            {
                device: PartRequest(
                    self.task_for(
                        "loss",
                        draws=_numbers(drawn),
                        batch_size=batch_size,
                        sizes=_sizes_text(given[device]),
                    ),
                    {HIDDEN: array_of(given[device]), VALUES: values},
                )
                for device, drawn in mine.items()
            }
        )
        total = sum(len(output) for output in outputs)
        mean = 0.0
        slopes: dict[Draw, Tensor] = {}
        gradient = {name: torch.zeros_like(p) for name, p in head.items()}
        for device, reply in replies.items():
            examples = [len(output) for output in given[device]]
            shares = [count / total for count in examples]
            found = reply.losses(len(examples))
            mean += sum(s * loss for s, loss in zip(shares, found, strict=True))
            shapes = [tuple(output.shape) for output in given[device]]
            for draw, share, slope in zip(
                mine[device], shares, reply.tensors(SLOPES, shapes), strict=True
            ):
                slopes[draw] = share * slope
            shapes = [tuple(parameter.shape) for parameter in head.values()]
            own = reply.tensors(GRADIENTS, shapes)
            for name, part in zip(head, own, strict=True):
                gradient[name] += sum(shares) * part
        return Losses(mean, [slopes[draw] for draw in draws], gradient)

    # --- what the holders of the sub-networks do -------------------------------------

    def run(
        self,
        micro_batches: MicroBatches,
        operations: IntArray,
        gradients: dict[str, Tensor],
    ) -> tuple[list[Tensor], Tensor]:
        """Run all layers under a schedule.

        Parameters
        ----------
        micro_batches
            M micro-batches.
        operations
            What each sub-network does in each of them, shape [S, M].
        gradients
            What the devices find on the way back is added to these, by name.

        Returns
        -------
        What the last layer gave for each micro-batch, and a leaf that all of it depends
        on: its gradient has to be asked for, or devices are not asked for theirs.
        """
        # Autograd goes back only to what wants a gradient, and the devices' parameters
        # are no tensors here.
        anchor = torch.zeros((), requires_grad=True)
        hidden = list(micro_batches.hidden)
        shape = (self.subnetworks.num_layers, self.subnetworks.num_groups, -1)
        table = operations.reshape(shape)
        for index, parts in enumerate(self.subnetworks.layers):
            rows = {
                m: tuple(Operation(o) for o in table[index, :, m])
                for m in range(len(hidden))
                if (table[index, :, m] != Operation.SKIP).any()
            }
            if not rows:
                continue
            for branch in Branch:
                entered = [enter(parts, branch, rows[m], hidden[m]) for m in rows]
                remote = _RemoteBranch(
                    self,
                    index,
                    branch,
                    [*rows.values()],
                    [micro_batches.masks[m] for m in rows],
                    gradients,
                )
                totals = _Contributions.apply(  # type: ignore[no-untyped-call]
                    remote, anchor, *entered
                )
                for m, total in zip(rows, totals, strict=True):
                    hidden[m] = leave(parts, branch, rows[m], hidden[m], total)
        return hidden, anchor

    # --- messages ---------------------------------------------------------------------

    def task_for(self, kind: str, **fields: Any) -> PartTask:
        """Return a task of this step."""
        groups = self.subnetworks.num_groups
        return PartTask(kind=kind, num_groups=groups, **self.task, **fields)

    def ask(self, requests: Mapping[str, PartRequest]) -> dict[str, _CheckedReply]:
        """Send tasks to devices; return their replies, by device id."""
        replies = self.exchange(requests)
        return {
            device: _CheckedReply(device, request.task, replies[device])
            for device, request in requests.items()
        }


@dataclass(frozen=True, eq=False)
class MicroBatches:
    """Hidden states [B, S, H] and token masks [B, S] of some micro-batches."""

    hidden: Sequence[Tensor]
    masks: Sequence[Tensor]


@dataclass(frozen=True, eq=False)
class Losses:
    """What the owners make of the micro-batches.

    Parameters
    ----------
    mean
        Mean loss over all examples.
    slopes
        Its gradient with respect to what the last layer gave for each micro-batch.
    head
        Its gradient with respect to the head, by name.
    """

    mean: float
    slopes: Sequence[Tensor]
    head: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class SpreadGradient:
    """The gradient of one step.

    Parameters
    ----------
    gradients
        Gradient of the mean loss over all examples, by name of the parameter.
    loss
        That loss.
    tokens
        Tokens of each micro-batch, padding included.
    """

    gradients: dict[str, Tensor]
    loss: float
    tokens: list[int]


def spread_gradient(
    spread: SpreadModel,
    draws: Sequence[Draw],
    batch_size: int,
    operations: IntArray,
) -> SpreadGradient:
    """Compute the gradient of some micro-batches, which devices draw, under a schedule.

    What `training.scheduled_gradient` computes in one process.

    Parameters
    ----------
    spread
        The model, in training mode or not.
    draws
        Who is to draw each of the M micro-batches.
    batch_size
        Examples of a micro-batch.
    operations
        What each sub-network does in each of them, shape [S, M].

    Raises
    ------
    PartFailed
        A device did not do its part.
    """
    parameters = dict(spread.model.named_parameters())
    names = spread.partition.trainable
    flags = {name: parameters[name].requires_grad for name in names}
    gradients = {name: torch.zeros_like(parameters[name]) for name in names}
    try:
        for name in names:
            parameters[name].requires_grad_(True)
        micro_batches = spread.inputs(draws, batch_size)
        outputs, anchor = spread.run(micro_batches, operations, gradients)
        losses = spread.losses(draws, batch_size, outputs)
        trained = [m for m, output in enumerate(outputs) if output.requires_grad]
        if trained:
            own = torch.autograd.grad(
                [outputs[m] for m in trained],
                [anchor, *(parameters[name] for name in names)],
                [losses.slopes[m] for m in trained],
                allow_unused=True,
            )
            for name, gradient in zip(names, own[1:], strict=True):
                if gradient is not None:
                    gradients[name] += gradient
    finally:
        for name, flag in flags.items():
            parameters[name].requires_grad_(flag)
    return SpreadGradient(
        gradients={**gradients, **losses.head},
        loss=losses.mean,
        tokens=[mask.numel() for mask in micro_batches.masks],
    )


class _Contributions(torch.autograd.Function):
    """Sums of what devices contribute to a branch, for some micro-batches."""

    @staticmethod
    def forward(
        ctx: Any, remote: _RemoteBranch, anchor: Tensor, *inputs: Tensor
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


@dataclass(frozen=True, eq=False)
class _RemoteBranch:
    """One branch of one layer, for some micro-batches.

    Parameters
    ----------
    spread
        The model.
    layer_index, branch
        Which branch.
    rows
        Operation of each of the layer's groups in each of the micro-batches.
    masks
        Which of their tokens there are.
    gradients
        Where the gradients of the devices' parameters are added up, by name.
    """

    spread: SpreadModel
    layer_index: int
    branch: Branch
    rows: Sequence[tuple[Operation, ...]]
    masks: Sequence[Tensor]
    gradients: dict[str, Tensor]

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        totals = [torch.zeros_like(x) for x in inputs]
        asked = self._members(lambda operation: operation != Operation.SKIP)
        requests = {
            device: self._request("forward", device, numbers, inputs)
            for device, numbers in asked.items()
        }
        for device, reply in self.spread.ask(requests).items():
            shapes = [tuple(inputs[m].shape) for m in asked[device]]
            for m, part in zip(
                asked[device], reply.tensors(HIDDEN, shapes), strict=True
            ):
                totals[m] += part
        return totals

    def backward(
        self,
        inputs: Sequence[Tensor],
        slopes: Sequence[Tensor],
        *,
        wants_inputs: bool,
    ) -> list[Tensor | None]:
        found: list[Tensor | None] = [None] * len(inputs)
        asked = self._members(lambda operation: operation == Operation.FULL)
        requests = {
            device: self._request(
                "backward",
                device,
                numbers,
                inputs,
                {SLOPES: array_of([slopes[m] for m in numbers])},
                wants_inputs=wants_inputs,
            )
            for device, numbers in asked.items()
        }
        for device, reply in self.spread.ask(requests).items():
            pieces = self._pieces(device)
            if pieces:
                shapes = [tuple(tensor.shape) for _, tensor in pieces]
                received = reply.tensors(GRADIENTS, shapes)
                for (piece, _), gradient in zip(pieces, received, strict=True):
                    piece.of(self.gradients[piece.name]).add_(gradient)
            if not wants_inputs:
                continue
            numbers = asked[device]
            shapes = [tuple(inputs[m].shape) for m in numbers]
            for m, slope in zip(numbers, reply.tensors(SLOPES, shapes), strict=True):
                before = found[m]
                found[m] = slope if before is None else before + slope
        return found

    def _members(self, runs: Callable[[Operation], bool]) -> dict[str, list[int]]:
        """Return the micro-batches in which some sub-network of a device runs."""
        asked: dict[str, list[int]] = {}
        for m, row in enumerate(self.rows):
            for device in dict.fromkeys(
                device
                for device, operation in zip(self._owners, row, strict=True)
                if runs(operation)
            ):
                asked.setdefault(device, []).append(m)
        return asked

    @property
    def _owners(self) -> list[str]:
        """Return the device of each of the layer's groups."""
        groups = self.spread.subnetworks.num_groups
        first = self.layer_index * groups
        numbers = self.spread.device_of[first : first + groups]
        return [self.spread.device_ids[number] for number in numbers]

    def _groups(self, device: str) -> tuple[int, int]:
        """Return the device's groups of the layer, which are neighbours."""
        mine = [g for g, owner in enumerate(self._owners) if owner == device]
        return mine[0], mine[-1] + 1

    def _pieces(self, device: str) -> list[tuple[Slice, Tensor]]:
        """Return the values that the device needs: what of which parameter."""
        spread = self.spread
        slices = part_slices(
            spread.model,
            spread.subnetworks.layers[self.layer_index],
            self.branch,
            *self._groups(device),
            spread.partition.trainable,
        )
        parameters = dict(spread.model.named_parameters())
        return [(piece, piece.of(parameters[piece.name])) for piece in slices]

    def _request(
        self,
        kind: str,
        device: str,
        numbers: Sequence[int],
        inputs: Sequence[Tensor],
        arrays: Mapping[str, npt.NDArray[Any]] | None = None,
        *,
        wants_inputs: bool = True,
    ) -> PartRequest:
        first, last = self._groups(device)
        rows = [
            to_text(
                [
                    operation if first <= group < last else Operation.SKIP
                    for group, operation in enumerate(self.rows[m])
                ]
            )
            for m in numbers
        ]
        hidden = [inputs[m] for m in numbers]
        values = [tensor for _, tensor in self._pieces(device)]
        masks = array_of([self.masks[m] for m in numbers]).astype(np.uint8)
        return PartRequest(
            self.spread.task_for(
                kind,
                layer_index=self.layer_index,
                branch_index=int(self.branch),
                first_group=first,
                last_group=last,
                rows=" ".join(rows),
                sizes=_sizes_text(hidden),
                wants_inputs=wants_inputs,
            ),
            {
                HIDDEN: array_of(hidden),
                MASKS: masks,
                VALUES: array_of(values) if values else np.empty(0, np.float32),
                **(arrays or {}),
            },
        )


def _by_device(draws: Sequence[Draw]) -> dict[str, list[Draw]]:
    mine: dict[str, list[Draw]] = {}
    for draw in draws:
        mine.setdefault(draw.device_id, []).append(draw)
    return mine


def _numbers(draws: Sequence[Draw]) -> str:
    return " ".join(str(draw.number) for draw in draws)


def _sizes_text(hidden: Sequence[Tensor]) -> str:
    return " ".join(f"{len(x)}x{x.shape[1]}" for x in hidden)


class _CheckedReply:
    """Reads a device's reply, which is never trusted."""

    def __init__(self, device: str, task: PartTask, reply: PartReply) -> None:
        self._device = device
        self._arrays = reply.arrays
        try:
            self._report = PartReport.from_record(reply.report)
        except MalformedRecord as error:
            raise PartFailed(device, str(error)) from None
        for name in ("kind", "step", "layer_index", "branch_index"):
            said, asked = getattr(self._report, name), getattr(task, name)
            if said != asked:
                raise PartFailed(device, f"{name}={quoted(said)} instead of {asked!r}")

    def sizes(self, count: int, batch_size: int) -> list[tuple[int, int]]:
        try:
            sizes = sizes_from_text(self._report.sizes)
        except MalformedRecord as error:
            raise PartFailed(self._device, str(error)) from None
        if len(sizes) != count or max(size[0] for size in sizes) > batch_size:
            raise PartFailed(
                self._device,
                f"sizes={self._report.sizes[:80]!r} instead of {count} micro-batches "
                f"of at most {batch_size} examples",
            )
        return sizes

    def losses(self, count: int) -> list[float]:
        data = self._report.losses
        losses = np.frombuffer(data[: len(data) // 4 * 4], "<f4")
        if len(data) != 4 * count or not np.isfinite(losses).all():
            raise PartFailed(self._device, f"{len(data)} bytes are no {count} losses")
        return [float(loss) for loss in losses]

    def tensors(
        self,
        name: str,
        shapes: Sequence[Sequence[int]],
        dtype: np.dtype[Any] = np.dtype("f4"),  # noqa: B008
    ) -> list[Tensor]:
        if name not in self._arrays:
            raise PartFailed(self._device, f"the array {name!r} is missing")
        total = sum(int(np.prod(shape)) for shape in shapes)
        try:
            array = read_npy(self._arrays[name], shape=(total,), dtype=dtype)
        except MalformedArray as error:
            raise PartFailed(self._device, f"{name}: {error}") from None
        if not np.isfinite(array).all():
            raise PartFailed(self._device, f"{name} holds NaN or infinity")
        return tensors_of(array, shapes)
