"""Many arrays as one: the values that a device is sent, the gradients of its update.

Flower takes some milliseconds and 0.4 kB for every array of a message, and a
transformer's layer has 16; server and device know names, shapes and types beforehand,
so nothing but the content has to travel.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lola_flwr.arrays import Float32Array
from lola_flwr.errors import UserError
from lola_flwr.wire.codec import Codec, codec_named
from lola_flwr.wire.npy import WireArray, WireType

# The names under which the arrays travel.
GRADIENTS = "gradients"
VALUES = "values"
MOVES = "moves"

# What the model comes down in where its changes are coded.
WHOLE_CODEC = "bf16"

_VALUES_CODEC = codec_named("fp32")


def packed_type(codec: Codec, shapes: Iterable[Sequence[int]]) -> WireType:
    """Tell what travels for the arrays of parameters of some shapes.

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
    """Put encoded arrays, at least one, one after the other.

    They are ordered by name: a model's own order may not be the same on both sides.
    """
    return np.concatenate([arrays[name].ravel() for name in sorted(arrays)])


def unpack(
    packed: WireArray, codec: Codec, shapes: Mapping[str, Sequence[int]]
) -> dict[str, WireArray]:
    """Take encoded arrays apart again.

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
    Views of ``packed`` by name, each of its parameter's wire type.
    """
    types = {name: codec.wire_type(shapes[name]) for name in sorted(shapes)}
    ends = np.cumsum([one.size for one in types.values()])
    parts = np.split(packed, ends[:-1])
    return {
        name: part.reshape(one.shape)
        for (name, one), part in zip(types.items(), parts, strict=True)
    }


def moved_by(values: Float32Array, change: Float32Array) -> Float32Array:
    """Return values after a change, rounded as they come down whole."""
    whole = codec_named(WHOLE_CODEC)
    return whole.decode(whole.encode(values + change), values.shape)


def received_moves(
    received: Mapping[str, npt.NDArray[Any]],
    codec: Codec,
    shapes: Mapping[str, Sequence[int]],
) -> dict[str, Float32Array]:
    """Return the changes of values that a device was sent, by name.

    Parameters
    ----------
    received
        What it was sent: encoded changes in one array of ``pack``, named ``MOVES``.
    codec
        What they travel in.
    shapes
        Shapes of the parameters that they are of, by name.

    Raises
    ------
    UserError
        These are the changes of another model.
    """
    if not shapes:
        return {}
    packed = received.get(MOVES, np.empty(0, np.uint8))
    expected = packed_type(codec, shapes.values())
    if (packed.shape, packed.dtype) != expected:
        raise UserError(
            f"Changes of {packed.nbytes} bytes received; those of this model's "
            f"{len(shapes)} parameters take {expected.nbytes}. Use the same model on "
            "server and device."
        )
    wire = unpack(packed, codec, shapes)
    return {name: codec.decode(wire[name], shape) for name, shape in shapes.items()}


def received_values(
    received: Mapping[str, npt.NDArray[Any]],
    shapes: Mapping[str, Sequence[int]],
    codec: Codec = _VALUES_CODEC,
) -> dict[str, Float32Array]:
    """Return the values that a device was sent, by name.

    Parameters
    ----------
    received
        What it was sent: one array of ``pack``, under the name ``VALUES``, or the
        values themselves by name.
    shapes
        Shapes, by name, of the device's own parameters of which values were sent.
    codec
        What they travel in, if in one array (default: as they are).

    Returns
    -------
    Values in the order of ``shapes``.

    Raises
    ------
    UserError
        These are the values of another model.
    """
    if VALUES not in received:
        return {name: received[name] for name in shapes if name in received}
    packed = received[VALUES]
    expected = packed_type(codec, shapes.values())
    if (packed.shape, packed.dtype) != expected:
        raise UserError(
            f"{packed.size} values of type {packed.dtype} received; this model has "
            f"{expected.size} in {len(shapes)} parameters, of type {expected.dtype}. "
            "Use the same model on server and device."
        )
    wire = unpack(packed, codec, shapes)
    return {name: codec.decode(wire[name], shape) for name, shape in shapes.items()}
