"""Which part of a model is on which device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from lola_flwr.arrays import IntArray
from lola_flwr.d2ft.subnetworks import (
    Branch,
    LayerNotUnderstood,
    Subnetworks,
    layer_names,
)
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.wire.records import PartTask


@dataclass(frozen=True)
class Place:
    """Neighbouring groups of one branch of a layer, which one device holds.

    Parameters
    ----------
    layer_index, branch
        The branch.
    first_group, last_group
        The groups, the last one excluded.
    """

    layer_index: int
    branch: Branch
    first_group: int
    last_group: int

    @classmethod
    def of(cls, task: PartTask) -> Place:
        """Return the place that a task is about."""
        branch = Branch(task.branch_index)
        return cls(task.layer_index, branch, task.first_group, task.last_group)

    def __str__(self) -> str:
        branch = self.branch.name.lower().replace("_", "-")
        return f"layer {self.layer_index} ({branch})"

    def fields(self) -> dict[str, Any]:
        """Return the fields of a task about it."""
        return {
            "layer_index": self.layer_index,
            "branch_index": int(self.branch),
            "first_group": self.first_group,
            "last_group": self.last_group,
        }


def places_of(
    device_of: IntArray, device_ids: Sequence[str], subnetworks: Subnetworks
) -> dict[Place, str]:
    """Return what each device holds where the sub-networks are placed so.

    Parameters
    ----------
    device_of
        Number of each sub-network's device, shape [S].
    device_ids
        The devices' ids, by number.
    subnetworks
        The sub-networks.
    """
    places = {}
    for index, owners in enumerate(device_of.reshape(subnetworks.num_layers, -1)):
        first = 0
        for number, neighbours in groupby(owners):
            last = first + len(list(neighbours))
            for branch in Branch:
                places[Place(index, branch, first, last)] = device_ids[number]
            first = last
    return places


def require_successive_layers(partition: BlockPartition) -> None:
    """Refuse blocks that are not layers which follow each other.

    Raises
    ------
    LayerNotUnderstood
        They are not.
    """
    numbers = [int(name.rpartition(".")[2]) for name in layer_names(partition)]
    if numbers != [*range(numbers[0], numbers[0] + len(numbers))]:
        raise LayerNotUnderstood(
            f"The blocks are the layers {numbers}: only layers that follow each other "
            "can be spread over devices."
        )
