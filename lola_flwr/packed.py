"""The gradients of an update as one array of the codec's type.

Flower takes some 1 ms and 0.4 kB for every array of a reply, and a transformer's
layer has 16; server and device know names, shapes and codec beforehand, so nothing but
the values has to travel.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from lola_flwr.codec import Codec, WireArray, WireType

# The name under which the array travels.
GRADIENTS = "gradients"


def packed_type(codec: Codec, shapes: Iterable[Sequence[int]]) -> WireType:
    """Tell what travels for the gradients of parameters of some shapes.

    Parameters
    ----------
    codec
        What they travel in.
    shapes
        Shapes of the parameters, at least one.
    """
    types = [codec.wire_type(shape) for shape in shapes]
    return WireType((sum(one.size for one in types),), types[0].dtype)


def pack(arrays: Mapping[str, WireArray]) -> WireArray:
    """Put encoded gradients, at least one, one after the other.

    They are ordered by name: a model's own order may not be the same on both sides.
    """
    return np.concatenate([arrays[name].ravel() for name in sorted(arrays)])


def unpack(
    packed: WireArray, codec: Codec, shapes: Mapping[str, Sequence[int]]
) -> dict[str, WireArray]:
    """Take encoded gradients apart again.

    Parameters
    ----------
    packed
        An array of ``packed_type(codec, shapes.values())``.
    codec
        What they travel in.
    shapes
        Shapes of the parameters, by name.

    Returns
    -------
    Views of ``packed`` by name, each of its gradient's wire type.
    """
    types = {name: codec.wire_type(shapes[name]) for name in sorted(shapes)}
    ends = np.cumsum([one.size for one in types.values()])
    parts = np.split(packed, ends[:-1])
    return {
        name: part.reshape(one.shape)
        for (name, one), part in zip(types.items(), parts, strict=True)
    }
