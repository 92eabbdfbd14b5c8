"""A model, the devices that its sub-networks are on, and how these are asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from lola_flwr.arrays import IntArray
from lola_flwr.d2ft.subnetworks import Subnetworks
from lola_flwr.errors import quoted
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.server.spread.exchange import (
    CheckedReply,
    Exchange,
    PartFailed,
    PartRequest,
)
from lola_flwr.server.spread.held import HeldValues
from lola_flwr.server.spread.places import Place, places_of
from lola_flwr.wire.records import PartTask


@dataclass(frozen=True, kw_only=True, eq=False)
class SpreadModel:
    """A model and the devices that its sub-networks are on.

    Parameters
    ----------
    model
        The server's own model; of its trainable values the server's own are those to
        compute with.
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
    held
        Who holds which values.
    note
        Told of each request, as it was asked at last, and the reply.
    """

    model: nn.Module
    partition: BlockPartition
    subnetworks: Subnetworks
    device_of: IntArray
    device_ids: Sequence[str]
    exchange: Exchange
    task: PartTask
    held: HeldValues
    note: Callable[[PartRequest, CheckedReply], None] = lambda request, reply: None

    def ask(self, requests: Mapping[str, PartRequest]) -> dict[str, CheckedReply]:
        """Send tasks to devices; return their replies, by device id.

        A device that lacks what it was sent before is sent it once more.
        """
        replies = ask(self.exchange, requests)
        again: dict[str, PartRequest] = {}
        for device, reply in replies.items():
            fuller = requests[device].fuller(reply.lacks) if reply.lacks else None
            if fuller is not None:
                again[device] = fuller
        replies |= ask(self.exchange, again)
        lacking = {d: reply.lacks for d, reply in replies.items() if reply.lacks}
        if lacking:
            raise PartFailed(
                {
                    device: f"it does not have the {quoted(lacks)} that it was sent in "
                    "this step; let its process live on, or give its device a store"
                    for device, lacks in lacking.items()
                }
            )
        for device, request in {**requests, **again}.items():
            self.note(request, replies[device])
        return replies

    @cached_property
    def places(self) -> dict[Place, str]:
        """What each device is to hold."""
        return places_of(self.device_of, self.device_ids, self.subnetworks)

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The model's parameters by name."""
        return dict(self.model.named_parameters())


def ask(
    exchange: Exchange, requests: Mapping[str, PartRequest]
) -> dict[str, CheckedReply]:
    """Send tasks to devices, if any; return their replies, by device id."""
    replies = exchange(requests) if requests else {}
    return {
        device: CheckedReply(device, request.task, replies[device])
        for device, request in requests.items()
    }
