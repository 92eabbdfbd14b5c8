"""One branch of a layer, whose parts devices compute: an exchange on either way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lola_flwr.arrays import Float64Array
from lola_flwr.d2ft.operations import Operation, to_text
from lola_flwr.d2ft.subnetworks import Branch
from lola_flwr.d2ft.wire import (
    HIDDEN,
    MASKS,
    SHARED,
    SLOPES,
    array_of,
    numbers_to_text,
    sizes_to_text,
)
from lola_flwr.server.spread.exchange import (
    LARGEST_HIDDEN,
    LARGEST_PARAMETER_GAIN,
    LARGEST_SLOPE_GAIN,
    LARGEST_VALUE,
    CheckedReply,
    PartFailed,
    PartRequest,
)
from lola_flwr.server.spread.model import SpreadModel
from lola_flwr.server.spread.owners import MicroBatch
from lola_flwr.server.spread.places import Place
from lola_flwr.wire.packing import GRADIENTS
from lola_flwr.wire.records import PartTask


@dataclass(frozen=True, eq=False)
class Found:
    """What devices find on the way back.

    Parameters
    ----------
    gradients
        Gradients of what the server steps, by name; devices' are added to these.
    squares, magnitudes
        Of each sub-network, the sum of the squares of the gradient of what its device
        holds alone, and of the magnitudes of these values, shape [S]. Both are 0 where
        nothing ran fully.
    places
        The places that such a gradient is of.
    """

    gradients: dict[str, Tensor]
    squares: Float64Array
    magnitudes: Float64Array
    places: set[Place] = field(default_factory=set)


@dataclass(frozen=True, eq=False)
class RemoteBranch:
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
    found
        What devices find on the way back is added to this.
    """

    spread: SpreadModel
    layer_index: int
    branch: Branch
    rows: Sequence[tuple[Operation, ...]]
    micro_batches: Sequence[MicroBatch]
    found: Found

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return what the sub-networks contribute to each micro-batch."""
        totals = [torch.zeros_like(x) for x in inputs]
        asked = self._members(lambda operation: operation != Operation.SKIP)
        replies = self.spread.ask(
            {
                device: self._forward_request(device, members, inputs)
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
        """Return the gradients of the inputs, if wanted, by those of what was given."""
        totals: list[Tensor | None] = [None] * len(inputs)
        asked = {
            device: members
            for device, members in self._members(
                lambda operation: operation == Operation.FULL
            ).items()
            if wants_inputs or any(self.spread.held.slices(self._places[device]))
        }
        replies = self.spread.ask(
            {
                device: self._backward_request(
                    device, members, inputs, slopes, wants_inputs
                )
                for device, members in asked.items()
            }
        )
        for device, members in asked.items():
            reply = replies[device]
            sent = max(float(slopes[m].abs().max()) for m in members)
            self._take_gradients(device, reply, LARGEST_PARAMETER_GAIN * sent)
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
        return any(any(self.spread.held.slices(p)) for p in self._places.values())

    def _take_gradients(self, device: str, reply: CheckedReply, largest: float) -> None:
        place = self._places[device]
        own, shared = self.spread.held.slices(place)
        named = self.spread.parameters
        if shared:
            shapes = [tuple(piece.of(named[piece.name]).shape) for piece in shared]
            found = reply.tensors(GRADIENTS, shapes, largest=largest)
            for piece, gradient in zip(shared, found, strict=True):
                piece.of(self.found.gradients[piece.name]).add_(gradient)
        if own:
            size = sum(piece.of(named[piece.name]).numel() for piece in own)
            count = place.last_group - place.first_group
            first = place.layer_index * self.spread.subnetworks.num_groups
            mine = slice(first + place.first_group, first + place.last_group)
            self.found.squares[mine] += reply.squares(count, size * largest**2)
            self.found.magnitudes[mine] += reply.magnitudes(count, size * LARGEST_VALUE)
            self.found.places.add(place)

    def _members(self, runs: Callable[[Operation], bool]) -> dict[str, list[int]]:
        """Return the micro-batches in which some sub-network of a device runs."""
        asked: dict[str, list[int]] = {device: [] for device in self._places}
        for m, row in enumerate(self.rows):
            for device, place in self._places.items():
                if any(map(runs, row[place.first_group : place.last_group])):
                    asked[device].append(m)
        return {device: members for device, members in asked.items() if members}

    @cached_property
    def _places(self) -> dict[str, Place]:
        """What each device holds of the branch."""
        return {
            device: place
            for place, device in self.spread.places.items()
            if (place.layer_index, place.branch) == (self.layer_index, self.branch)
        }

    def _forward_request(
        self, device: str, members: Sequence[int], inputs: Sequence[Tensor]
    ) -> PartRequest:
        spread, place = self.spread, self._places[device]
        arrays = self._inputs(device, members, inputs)
        task = self._task("forward", device, members)
        if not spread.held.slices(place).own:
            return PartRequest(task, arrays)

        def with_values(_: str = "") -> PartRequest:
            values, told = spread.held.send(place, device, task.step)
            fields = spread.held.fields(place)
            return PartRequest(
                replace(task, optimizer=told, **fields), {**arrays, **values}
            )

        if not spread.held.is_held(place, device):
            return with_values()
        return PartRequest(
            replace(task, **spread.held.fields(place)), arrays, with_values
        )

    def _backward_request(
        self,
        device: str,
        members: Sequence[int],
        inputs: Sequence[Tensor],
        slopes: Sequence[Tensor],
        wants_inputs: bool,
    ) -> PartRequest:
        spread, place = self.spread, self._places[device]
        arrays = {SLOPES: array_of([slopes[m] for m in members])}
        if not np.isfinite(arrays[SLOPES]).all():
            raise PartFailed({}, "the gradient became infinite on its way back")
        task = replace(
            self._task("backward", device, members), wants_inputs=wants_inputs
        )
        if spread.held.slices(place).own:
            task = replace(task, **spread.held.fields(place))

        def with_inputs(lacks: str) -> PartRequest | None:
            if lacks != "inputs":
                return None  # what a device holds, the server has not
            return PartRequest(
                task, {**arrays, **self._inputs(device, members, inputs)}
            )

        return PartRequest(task, arrays, with_inputs)

    def _inputs(
        self, device: str, members: Sequence[int], inputs: Sequence[Tensor]
    ) -> dict[str, npt.NDArray[Any]]:
        """Return what a device is sent to compute a branch of micro-batches."""
        masks = array_of([self.micro_batches[m].mask for m in members])
        arrays: dict[str, npt.NDArray[Any]] = {
            HIDDEN: array_of([inputs[m] for m in members]),
            MASKS: masks.astype(np.uint8),
        }
        shared = self.spread.held.slices(self._places[device]).shared
        if shared:
            named = self.spread.parameters
            arrays[SHARED] = array_of([piece.of(named[piece.name]) for piece in shared])
        return arrays

    def _task(self, kind: str, device: str, members: Sequence[int]) -> PartTask:
        place = self._places[device]
        groups = slice(place.first_group, place.last_group)
        return replace(
            self.spread.task,
            kind=kind,
            numbers=numbers_to_text(self.micro_batches[m].number for m in members),
            rows=" ".join(to_text(self.rows[m][groups]) for m in members),
            sizes=sizes_to_text([self.micro_batches[m].hidden for m in members]),
            **place.fields(),
        )
