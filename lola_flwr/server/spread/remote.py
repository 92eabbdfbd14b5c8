"""A model's layers on the server, whose sub-networks other machines compute.

What devices contribute to a branch is one function in autograd's graph: on the way
forward its call is an exchange with the devices, on the way back another one. All
micro-batches go through it together. Normalisations, biases and dropout, which belong
to a layer as a whole, are the server's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lola_flwr.arrays import IntArray
from lola_flwr.d2ft.branches import enter, leave
from lola_flwr.d2ft.operations import Operation, to_text
from lola_flwr.d2ft.subnetworks import Branch, Slice
from lola_flwr.d2ft.wire import (
    HIDDEN,
    MASKS,
    SLOPES,
    array_of,
    numbers_to_text,
    part_slices,
    sizes_to_text,
)
from lola_flwr.model.backprop import only_trainable
from lola_flwr.server.spread.exchange import (
    LARGEST_HIDDEN,
    LARGEST_PARAMETER_GAIN,
    LARGEST_SLOPE_GAIN,
    PartFailed,
    PartRequest,
)
from lola_flwr.server.spread.model import SpreadModel
from lola_flwr.server.spread.owners import MicroBatch, draw_micro_batches, losses_of
from lola_flwr.wire.packing import GRADIENTS, VALUES


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


def run_layers(
    spread: SpreadModel,
    micro_batches: Sequence[MicroBatch],
    operations: IntArray,
    gradients: dict[str, Tensor],
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
            remote = _RemoteBranch(
                spread,
                index,
                branch,
                [*rows.values()],
                [micro_batches[m] for m in rows],
                gradients,
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

    Raises
    ------
    PartFailed
        A device did not do its part.
    """
    parameters = spread.parameters
    names = spread.partition.trainable
    gradients = {name: torch.zeros_like(parameters[name]) for name in names}
    with only_trainable(spread.model, names):
        micro_batches = draw_micro_batches(spread, numbers, batch_size, max_tokens)
        outputs, anchor = run_layers(spread, micro_batches, operations, gradients)
        losses = losses_of(
            spread,
            micro_batches,
            batch_size,
            outputs,
            example_weight=example_weight,
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
        loss=losses.mean,
        tokens=[one.mask.numel() for one in micro_batches],
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
    micro_batches
        The micro-batches.
    gradients
        Where the gradients of the devices' parameters are added up, by name.
    """

    spread: SpreadModel
    layer_index: int
    branch: Branch
    rows: Sequence[tuple[Operation, ...]]
    micro_batches: Sequence[MicroBatch]
    gradients: dict[str, Tensor]

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        totals = [torch.zeros_like(x) for x in inputs]
        asked = self._members(lambda operation: operation != Operation.SKIP)
        replies = self.spread.ask(
            {
                device: self._request("forward", device, members, inputs)
                for device, members in asked.items()
            }
        )
        for device, members in asked.items():
            shapes = [tuple(inputs[m].shape) for m in members]
            found = replies[device].tensors(HIDDEN, shapes, largest=LARGEST_HIDDEN)
            for m, part in zip(members, found, strict=True):
                totals[m] += part
        return totals

    def backward(
        self,
        inputs: Sequence[Tensor],
        slopes: Sequence[Tensor],
        *,
        wants_inputs: bool,
    ) -> list[Tensor | None]:
        totals: list[Tensor | None] = [None] * len(inputs)
        asked = {
            device: members
            for device, members in self._members(
                lambda operation: operation == Operation.FULL
            ).items()
            if wants_inputs or self._pieces[device]
        }
        replies = self.spread.ask(
            {
                device: self._request(
                    "backward", device, members, inputs, slopes, wants_inputs
                )
                for device, members in asked.items()
            }
        )
        for device, members in asked.items():
            reply, pieces = replies[device], self._pieces[device]
            sent = max(float(slopes[m].abs().max()) for m in members)
            if pieces:
                shapes = [tuple(tensor.shape) for _, tensor in pieces]
                found = reply.tensors(
                    GRADIENTS, shapes, largest=LARGEST_PARAMETER_GAIN * sent
                )
                for (piece, _), gradient in zip(pieces, found, strict=True):
                    piece.of(self.gradients[piece.name]).add_(gradient)
            if not wants_inputs:
                continue
            shapes = [tuple(inputs[m].shape) for m in members]
            found = reply.tensors(SLOPES, shapes, largest=LARGEST_SLOPE_GAIN * sent)
            for m, part in zip(members, found, strict=True):
                before = totals[m]
                totals[m] = part if before is None else before + part
        return totals

    @property
    def is_trained(self) -> bool:
        """Whether any of the branch's sub-networks has something to train."""
        return any(self._pieces.values())

    def _members(self, runs: Callable[[Operation], bool]) -> dict[str, list[int]]:
        """Return the micro-batches in which some sub-network of a device runs."""
        owners, asked = self._owners, dict[str, list[int]]()
        for m, row in enumerate(self.rows):
            running = [d for d, o in zip(owners, row, strict=True) if runs(o)]
            for device in dict.fromkeys(running):
                asked.setdefault(device, []).append(m)
        return asked

    @cached_property
    def _owners(self) -> list[str]:
        """The device of each of the layer's groups."""
        groups = self.spread.subnetworks.num_groups
        first = self.layer_index * groups
        numbers = self.spread.device_of[first : first + groups]
        return [self.spread.device_ids[number] for number in numbers]

    def _groups(self, device: str) -> tuple[int, int]:
        """Return the device's groups of the layer, from first to last - 1."""
        mine = [g for g, owner in enumerate(self._owners) if owner == device]
        return mine[0], mine[-1] + 1

    @cached_property
    def _pieces(self) -> dict[str, list[tuple[Slice, Tensor]]]:
        """The values that each device needs: what of which parameter."""
        spread = self.spread
        parts = spread.subnetworks.layers[self.layer_index]
        trainable = spread.partition.trainable
        return {
            device: [
                (piece, piece.of(spread.parameters[piece.name]))
                for piece in part_slices(
                    spread.parameter_names,
                    parts,
                    self.branch,
                    *self._groups(device),
                    trainable,
                )
            ]
            for device in dict.fromkeys(self._owners)
        }

    def _request(
        self,
        kind: str,
        device: str,
        members: Sequence[int],
        inputs: Sequence[Tensor],
        slopes: Sequence[Tensor] | None = None,
        wants_inputs: bool = True,
    ) -> PartRequest:
        first, last = self._groups(device)
        hidden = [inputs[m] for m in members]
        masks = array_of([self.micro_batches[m].mask for m in members])
        arrays: dict[str, npt.NDArray[Any]] = {
            HIDDEN: array_of(hidden),
            MASKS: masks.astype(np.uint8),
            VALUES: array_of([tensor for _, tensor in self._pieces[device]]),
        }
        if slopes is not None:
            arrays[SLOPES] = array_of([slopes[m] for m in members])
            if not np.isfinite(arrays[SLOPES]).all():
                raise PartFailed({}, "the gradient became infinite on its way back")
        task = replace(
            self.spread.task,
            kind=kind,
            numbers=numbers_to_text(self.micro_batches[m].number for m in members),
            layer_index=self.layer_index,
            branch_index=int(self.branch),
            first_group=first,
            last_group=last,
            rows=" ".join(to_text(self.rows[m][first:last]) for m in members),
            sizes=sizes_to_text(hidden),
            wants_inputs=wants_inputs,
        )
        return PartRequest(task, arrays)
