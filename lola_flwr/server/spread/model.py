"""A model, the devices that its sub-networks are on, and how these are asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from lola_flwr.arrays import IntArray
from lola_flwr.d2ft.subnetworks import Subnetworks
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.server.spread.exchange import CheckedReply, Exchange, PartRequest
from lola_flwr.wire.records import PartTask


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
        Number of each sub-network's device, shape [S]; a device's sub-networks are
        neighbours.
    device_ids
        The devices' ids, by number.
    exchange
        How they are asked.
    task
        What all tasks of the step have in common.
    """

    model: nn.Module
    partition: BlockPartition
    subnetworks: Subnetworks
    device_of: IntArray
    device_ids: Sequence[str]
    exchange: Exchange
    task: PartTask

    def ask(self, requests: Mapping[str, PartRequest]) -> dict[str, CheckedReply]:
        """Send tasks to devices; return their replies, by device id."""
        if not requests:
            return {}
        replies = self.exchange(requests)
        return {
            device: CheckedReply(device, request.task, replies[device])
            for device, request in requests.items()
        }

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The model's parameters by name."""
        return dict(self.model.named_parameters())

    @cached_property
    def parameter_names(self) -> dict[int, str]:
        """Their names, by ``id``."""
        return {id(parameter): name for name, parameter in self.parameters.items()}
