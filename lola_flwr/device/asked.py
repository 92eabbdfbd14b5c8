"""A task of a step of a model that is spread over devices, and what it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor, nn

from lola_flwr.d2ft.subnetworks import Branch, Slice, Subnetworks, hidden_size
from lola_flwr.d2ft.wire import PartSlices, part_slices, sizes_from_text, tensors_of
from lola_flwr.device.keeping import Keeping, Shelf
from lola_flwr.model.backprop import Batch, BatchWeight, LossFunction
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.randomness import rng_for
from lola_flwr.wire.records import PartReport, PartTask

Arrays = Mapping[str, npt.NDArray[Any]]

# What a device sends back: what the arrays are, and the arrays.
PartResult = tuple[PartReport, dict[str, npt.NDArray[Any]]]


@dataclass(frozen=True, eq=False)
class Part:
    """A task, and what it takes to do it."""

    model: nn.Module
    partition: BlockPartition
    subnetworks: Subnetworks
    task: PartTask
    arrays: Arrays
    draw: Callable[[int, int], Batch]
    loss_function: LossFunction
    batch_weight: BatchWeight
    keeping: Keeping

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The model's parameters by name."""
        return dict(self.model.named_parameters())

    @cached_property
    def names(self) -> dict[int, str]:
        """Their names, by ``id``."""
        return {id(parameter): name for name, parameter in self.parameters.items()}

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Examples and tokens of the message's micro-batches."""
        return sizes_from_text(self.task.sizes)

    @property
    def numbers(self) -> list[int]:
        """Their numbers."""
        return [int(number) for number in self.task.numbers.split()]

    @property
    def branch(self) -> Branch:
        """The branch that the task is about."""
        return Branch(self.task.branch_index)

    @cached_property
    def shelf(self) -> Shelf:
        """Where the device keeps what is its own of that branch."""
        return Shelf(self.keeping, self.model, self.task)

    @cached_property
    def slices(self) -> PartSlices:
        """What the branch's groups need of which trained parameters."""
        return part_slices(
            self.names,
            self.subnetworks.layers[self.task.layer_index],
            self.branch,
            self.task.first_group,
            self.task.last_group,
            self.partition.trainable,
        )

    def tensors(self, slices: Sequence[Slice]) -> list[Tensor]:
        """Return parts of parameters, as views."""
        return [piece.of(self.parameters[piece.name]) for piece in slices]

    def batches(self) -> list[Batch]:
        """Draw the micro-batches."""
        return [
            {
                name: tensor.to(self.device)
                for name, tensor in self.draw(number, self.task.batch_size).items()
            }
            for number in self.numbers
        ]

    def hidden(self, name: str) -> list[Tensor]:
        """Return the message's hidden states, or gradients of such."""
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
        seed = int(rng.integers(2**63))
        if self.device.type == "cpu":
            # It would look for GPUs, which takes longer than a small model's layer.
            torch.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)

    def report(self, **fields: Any) -> PartReport:
        """Say what goes back."""
        task = self.task
        return PartReport(
            kind=task.kind,
            step=task.step,
            layer_index=task.layer_index,
            branch_index=task.branch_index,
            **fields,
        )


@torch.no_grad()
def load(tensors: Sequence[Tensor], values: npt.NDArray[Any]) -> None:
    """Overwrite tensors with the values of an array.

    Raises
    ------
    UserError
        It holds others.
    """
    received = tensors_of(values, [tuple(tensor.shape) for tensor in tensors])
    for tensor, value in zip(tensors, received, strict=True):
        tensor.copy_(value)
