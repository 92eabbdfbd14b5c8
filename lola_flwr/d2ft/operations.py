"""The three things that can be done with a sub-network in a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

from lola_flwr.errors import UserError


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


_LETTERS = {Operation.SKIP: "s", Operation.FORWARD: "o", Operation.FULL: "f"}


def to_text(operations: Sequence[Operation]) -> str:
    """Return operations as letters, from the input to the output: ``"ffoof"``."""
    return "".join(_LETTERS[operation] for operation in operations)


def from_text(letters: str) -> tuple[Operation, ...]:
    """Read operations from letters.

    Raises
    ------
    UserError
        There is another letter.
    """
    known = {letter: operation for operation, letter in _LETTERS.items()}
    if not set(letters) <= set(known):
        raise UserError(f"operations={letters!r} must consist of the letters f, o, s.")
    return tuple(known[letter] for letter in letters)
