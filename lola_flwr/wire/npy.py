"""NumPy's .npy format, in which Flower serialises arrays, read without trust."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lola_flwr.errors import quoted

# A .npy header is padded to this many bytes; one that is longer is not Flower's.
NPY_HEADER_BYTES = 128


WireArray = npt.NDArray[np.generic]


class WireType(NamedTuple):
    """Shape and type of the array that travels."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the array, without the header of its file format."""
        return self.size * self.dtype.itemsize


class MalformedArray(ValueError):
    """Received bytes are not the array that was asked for."""


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
    # Types of other libraries are written as mere bytes.
    if dtype.isbuiltin == 1:
        usual = _usual_header(tuple(shape), dtype)
        if len(data) == len(usual) + expected_bytes and data.startswith(usual):
            return np.frombuffer(data, dtype, offset=len(usual)).reshape(shape)
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


@lru_cache(maxsize=4096)
def _usual_header(shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> bytes:
    """Return what NumPy writes before a row-major array.

    Comparing it takes a tenth of the time in which NumPy parses it.
    """
    stream = BytesIO()
    described = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(
        stream, {"descr": described, "fortran_order": False, "shape": shape}
    )
    return stream.getvalue()
