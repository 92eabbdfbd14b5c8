"""What a device computes where the model is spread over devices.

A step of D2FT takes many exchanges. The owners of the micro-batches give what the first
layer is given; every branch of every layer is an exchange with the devices that hold
its sub-networks, and on the way back another one; between the two, the owners turn what
the last layer gave into a loss, so that labels stay where they are.

A device holds the values of its sub-networks, and steps them by itself. It is sent them
when they change hands, and returns them when it is asked to.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import nn

from lola_flwr.d2ft.find import find_subnetworks
from lola_flwr.d2ft.subnetworks import Subnetworks
from lola_flwr.device.asked import Arrays, Part, PartResult
from lola_flwr.device.holder import backward, forward, give_back
from lola_flwr.device.keeping import Keeping
from lola_flwr.device.owner import compute_losses, draw_inputs
from lola_flwr.model.backprop import (
    Batch,
    BatchWeight,
    LossFunction,
    model_loss,
    num_examples_of,
    train_mode,
)
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.wire.records import MalformedRecord, PartTask


def compute_part(
    model: nn.Module,
    partition: BlockPartition,
    task: PartTask,
    arrays: Arrays,
    *,
    draw: Callable[[int, int], Batch],
    loss_function: LossFunction,
    batch_weight: BatchWeight = num_examples_of,
    keeping: Keeping | None = None,
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
    keeping
        Where the device keeps what is its own (default: in memory alone).

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
        "inputs": draw_inputs,
        "forward": forward,
        "backward": backward,
        "loss": compute_losses,
        "return": give_back,
    }.get(task.kind)
    if compute is None:
        raise MalformedRecord(f"kind={task.kind!r} is no part of a step.")
    part = Part(
        model,
        partition,
        _subnetworks_of(model, partition, task.num_groups),
        task,
        arrays,
        draw,
        loss_function,
        batch_weight,
        Keeping() if keeping is None else keeping,
    )
    return compute(part)


def no_examples(number: int, batch_size: int) -> Batch:
    """Stand for examples where there are none."""
    raise AssertionError("examples are the devices' own")


class StandIn(Protocol):
    """Computes what a device would."""

    def __call__(
        self,
        task: PartTask,
        arrays: Arrays,
        draw: Callable[[int, int], Batch] = no_examples,
        /,
    ) -> PartResult:
        """Do what a task asks for; ``draw`` as for `compute_part`."""


def stand_in(model: nn.Module, partition: BlockPartition) -> StandIn:
    """Return what computes for the server what a device would, on the server's model.

    It has no examples but those that it is given, and the values of groups are
    overwritten.
    """
    # The same parameters, but what is kept with them is not kept for devices that may
    # share the model.
    own = copy.copy(model)

    def compute(
        task: PartTask,
        arrays: Arrays,
        draw: Callable[[int, int], Batch] = no_examples,
    ) -> PartResult:
        with torch.random.fork_rng():
            train_mode(own)
            return compute_part(
                own, partition, task, arrays, draw=draw, loss_function=model_loss
            )

    return compute


@dataclass(frozen=True, eq=False)
class _Known:
    """A model's sub-networks, and the parameters that they are of."""

    parameters: tuple[int, ...]
    partition: BlockPartition
    subnetworks: Subnetworks


_known: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()


def _subnetworks_of(
    model: nn.Module, partition: BlockPartition, num_groups: int
) -> Subnetworks:
    """Find a model's sub-networks, unless they are those of the message before."""
    parameters = tuple(map(id, model.parameters()))
    known = _known.get(model)
    if (
        known is None
        or (known.parameters, known.partition) != (parameters, partition)
        or known.subnetworks.num_groups != num_groups
    ):
        # They are compared with the layers, more exactly than bfloat16 is.
        kind = next(model.parameters()).device.type
        with torch.autocast(kind, enabled=False):
            subnetworks = find_subnetworks(model, partition, num_groups=num_groups)
        known = _known[model] = _Known(parameters, partition, subnetworks)
    return known.subnetworks
