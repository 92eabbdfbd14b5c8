"""Whether a device holds the frozen weights that the server takes it to hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lola_flwr.errors import UserError
from lola_flwr.wire.records import Assignment, PartTask

if TYPE_CHECKING:
    from torch import nn

    from lola_flwr.model.blocks import BlockPartition


def check_base(
    model: nn.Module, partition: BlockPartition, assignment: Assignment
) -> None:
    """Make sure that a device's frozen weights are the server's.

    Raises
    ------
    UserError
        They are not.
    """
    # A device that trains by programs has no PyTorch.
    from lola_flwr.model.loading import fingerprint

    check_fingerprint(fingerprint(model, partition.frozen), assignment)


def check_fingerprint(own: str, asked: Assignment | PartTask) -> None:
    """Make sure that a device's frozen weights, of this digest, are the server's.

    Raises
    ------
    UserError
        They are not.
    """
    if own != asked.base_fingerprint:
        raise UserError(
            "The frozen base weights of this device differ from the server's; use "
            "the same model, revision and seed on both, or load what the server sends."
        )
