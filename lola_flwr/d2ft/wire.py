"""How hidden states, gradients and values travel between server and devices.

Tensors of several micro-batches travel one after the other in one float32 array, since
every array of a message takes Flower some milliseconds.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lola_flwr.d2ft.subnetworks import Branch, LayerParts, Slice, branch_slices
from lola_flwr.errors import UserError
from lola_flwr.wire.records import MalformedRecord

# Arrays of the messages beside values and gradients of parameters: hidden states,
# gradients of a loss with respect to such, for each token whether there is one; what
# an optimizer keeps beside values, and values that devices share.
HIDDEN = "hidden"
SLOPES = "slopes"
MASKS = "masks"
MOMENTS = "moments"
SHARED = "shared"


def digest_of(batches: Sequence[Mapping[str, Tensor]]) -> str:
    """Return what micro-batches are known by."""
    digest = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            digest.update(f"{name} {tuple(batch[name].shape)}".encode())
            digest.update(batch[name].contiguous().numpy(force=True).tobytes())
    return digest.hexdigest()[:32]


def numbers_to_text(numbers: Iterable[int]) -> str:
    """Write numbers of micro-batches, or what they weigh: ``"3 9"``."""
    return " ".join(map(str, numbers))


def numbers_from_text(text: str) -> list[int]:
    """Read numbers: ``"3 9"``.

    Raises
    ------
    MalformedRecord
        The text is another.
    """
    if not re.fullmatch(r"\d{1,12}( \d{1,12})*", text):
        raise MalformedRecord(f"numbers={text[:80]!r} must be like '3 9'.")
    return [int(number) for number in text.split()]


def sizes_to_text(hidden: Sequence[Tensor]) -> str:
    """Write examples and tokens of hidden states [B, S, H]: ``"8x21 8x17"``."""
    return " ".join(f"{len(x)}x{x.shape[1]}" for x in hidden)


def sizes_from_text(text: str) -> list[tuple[int, int]]:
    """Read examples and tokens of micro-batches: ``"8x21 8x17"``.

    Raises
    ------
    MalformedRecord
        The text is another.
    """
    if not re.fullmatch(
        r"[1-9]\d{0,6}x[1-9]\d{0,6}( [1-9]\d{0,6}x[1-9]\d{0,6})*", text
    ):
        raise MalformedRecord(f"sizes={text[:80]!r} must be like '8x21 8x17'.")
    pairs = (size.split("x") for size in text.split())
    return [(int(examples), int(tokens)) for examples, tokens in pairs]


def array_of(tensors: Sequence[Tensor]) -> npt.NDArray[np.float32]:
    """Put tensors, perhaps none, one after the other in one array."""
    if not tensors:
        return np.empty(0, np.float32)
    flat = [tensor.detach().reshape(-1).float() for tensor in tensors]
    return np.asarray(torch.cat(flat).numpy(force=True))


def tensors_of(
    array: npt.NDArray[Any], shapes: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Take an array apart into tensors of some shapes.

    Raises
    ------
    UserError
        It does not hold as many values.
    """
    sizes = [int(np.prod(shape)) for shape in shapes]
    if array.shape != (sum(sizes),):
        raise UserError(
            f"An array of shape {array.shape} received instead of {sum(sizes)} values; "
            "use the same model on server and device."
        )
    parts = torch.split(torch.from_numpy(np.array(array, np.float32)), sizes)
    return [part.view(*shape) for part, shape in zip(parts, shapes, strict=True)]


class PartSlices(NamedTuple):
    """What a branch's groups need of the trainable parameters.

    Parameters
    ----------
    own
        What no other group needs.
    shared
        What they share with the layer's other groups.
    """

    own: list[Slice]
    shared: list[Slice]


def part_slices(
    names: Mapping[int, str],
    parts: LayerParts,
    branch: Branch,
    first_group: int,
    last_group: int,
    trainable: Sequence[str],
) -> PartSlices:
    """Return what a branch's groups need of the trainable parameters, in their order.

    Parameters
    ----------
    names
        Name of each of the model's parameters, by ``id``.
    parts
        A layer of it.
    branch, first_group, last_group
        Which of its branches, and which groups, the last one excluded.
    trainable
        Names of the parameters that are trained.
    """
    trained = set(trainable)
    own, needed = (
        [
            piece
            for piece in branch_slices(
                parts, branch, first_group, last_group, names, shared=shared
            )
            if piece.name in trained
        ]
        for shared in (False, True)
    )
    mine = {piece.name for piece in own}
    return PartSlices(own, [piece for piece in needed if piece.name not in mine])
