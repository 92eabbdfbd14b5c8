"""Payload codecs: how a gradient travels, and how received bytes are read safely.

A codec turns a float32 array into an array of a wire type and back. NumPy has no
bfloat16, so "bf16" travels as uint16. Every array crosses the network in NumPy's .npy
format, as Flower serialises it; nothing is ever unpickled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import numpy.typing as npt

from lola_flwr.errors import UserError, quoted

# A .npy header is padded to this many bytes; one that is longer is not Flower's.
NPY_HEADER_BYTES = 128


class MalformedArray(ValueError):
    """Received bytes are not the array that was asked for."""


@dataclass(frozen=True)
class Codec:
    """A lossless or rounding representation of float32 values.

    Parameters
    ----------
    wire_dtype
        Type that travels.
    encode
        From float32 to the wire type, same shape.
    decode
        Back to float32.
    """

    wire_dtype: np.dtype[np.generic]
    encode: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.generic]]
    decode: Callable[[npt.NDArray[np.generic]], npt.NDArray[np.float32]]

    @property
    def bits_per_element(self) -> int:
        """Bits that one value takes on the wire."""
        return 8 * self.wire_dtype.itemsize


def _to_bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    bits = values.view(np.uint32)
    # Round to nearest, ties to even, on the 16 bits that bfloat16 drops.
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    # Rounding would carry some of the NaNs over into zeros.
    rounded = np.where(np.isnan(values), np.uint32(0x7FC00000), rounded)
    return (rounded >> np.uint32(16)).astype(np.uint16)


def _from_bf16(wire: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
    return (wire.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _to_fp16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
    # Beyond fp16's range a gradient saturates instead of becoming infinite.
    largest = float(np.finfo(np.float16).max)
    return np.clip(values, -largest, largest).astype(np.float16)


CODECS = {
    "fp32": Codec(
        np.dtype(np.float32), lambda values: values, lambda wire: wire.astype("f4")
    ),
    "bf16": Codec(np.dtype(np.uint16), _to_bf16, _from_bf16),
    "fp16": Codec(np.dtype(np.float16), _to_fp16, lambda wire: wire.astype("f4")),
}


def codec_named(name: str) -> Codec:
    """Return the codec of that name.

    Raises
    ------
    UserError
        Unknown name; the message lists the known ones.
    """
    if name not in CODECS:
        raise UserError(f"codec={name!r} is unknown; choose from {', '.join(CODECS)}.")
    return CODECS[name]


def read_npy(
    data: bytes, *, shape: Sequence[int], dtype: np.dtype[np.generic]
) -> npt.NDArray[np.generic]:
    """Read an array whose shape and type are known beforehand.

    The header is compared with what is expected before any memory is taken, so that a
    message cannot make the reader allocate more than the caller announced.

    Parameters
    ----------
    data
        Bytes in .npy format.
    shape
        Expected shape.
    dtype
        Expected type.

    Returns
    -------
    A read-only view of ``data``, of the expected shape.

    Raises
    ------
    MalformedArray
        The bytes are not in .npy format, or hold another shape, type or length.
    """
    expected_bytes = math.prod(shape) * dtype.itemsize
    if len(data) > expected_bytes + NPY_HEADER_BYTES:
        raise MalformedArray(
            f"{len(data)} B received; expected at most "
            f"{expected_bytes + NPY_HEADER_BYTES} B for shape {tuple(shape)}."
        )
    stream = BytesIO(data)
    try:
        if np.lib.format.read_magic(stream) != (1, 0):
            raise MalformedArray("Not an array in .npy format 1.0.")
        header = np.lib.format.read_array_header_1_0(stream)
    except MalformedArray:
        raise
    # NumPy parses the header as a Python literal; hostile bytes make it fail in many
    # ways, all of which mean the same here.
    except Exception as error:
        raise MalformedArray(f"Not an array in .npy format: {quoted(error)}") from None
    received_shape, fortran_order, received_dtype = header
    if fortran_order and len(shape) > 1:
        raise MalformedArray("Column-major array; send row-major arrays.")
    if received_shape != tuple(shape) or received_dtype != dtype:
        raise MalformedArray(
            f"Array of shape {received_shape} and type {received_dtype}; expected "
            f"{tuple(shape)} and {dtype}."
        )
    body = memoryview(data)[stream.tell() :]
    if len(body) != expected_bytes:
        raise MalformedArray(
            f"Array body of {len(body)} B; expected {expected_bytes} B."
        )
    return np.frombuffer(body, dtype=dtype).reshape(shape)
