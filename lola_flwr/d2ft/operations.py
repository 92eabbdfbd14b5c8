"""The three things that can be done with a sub-network in a micro-batch."""

from __future__ import annotations

from enum import IntEnum


class Operation(IntEnum):
    """What is done with one sub-network in one micro-batch.

    ``SKIP``: nothing; what comes in goes past it on the residual connection.
    ``FORWARD``: it contributes to the output, but keeps nothing for the backward pass,
    and no gradient flows through it.
    ``FULL``: forward and backward.
    """

    SKIP = 0
    FORWARD = 1
    FULL = 2
