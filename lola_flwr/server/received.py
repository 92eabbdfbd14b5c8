"""Read single arrays of a device's reply, which is never trusted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lola_flwr.arrays import Float32Array
from lola_flwr.wire.codec import Codec
from lola_flwr.wire.npy import MalformedArray, read_npy


class UpdateRefused(Exception):
    """A reply cannot be used.

    Parameters
    ----------
    reason
        Short reason to count by, such as ``"non-finite"``.
    detail
        What exactly is wrong.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


def read_array(
    name: str, data: bytes, shape: Sequence[int], *dtypes: np.dtype[np.generic]
) -> npt.NDArray[np.generic]:
    """Read a received array of one of several types.

    Raises
    ------
    UpdateRefused
        It is none of these, as all functions here do.
    """
    refusals = []
    for dtype in dict.fromkeys(dtypes):
        try:
            return read_npy(data, shape=shape, dtype=dtype)
        except MalformedArray as error:
            refusals.append(str(error))
    raise UpdateRefused("wrong-array", f"{name}: {refusals[0]}")


def decoded(
    name: str, wire: npt.NDArray[np.generic], shape: Sequence[int], codec: Codec
) -> Float32Array:
    """Decode a received array."""
    try:
        return codec.decode(wire, shape)
    except MalformedArray as error:
        raise UpdateRefused("wrong-array", f"{name}: {error}") from None


def read_move(
    name: str, data: bytes, sent: npt.NDArray[Any], codec: Codec | None
) -> Float32Array:
    """Read how far a parameter is from what was sent, as a gradient: sent less trained.

    Parameters
    ----------
    name, data
        The parameter, and what was received of it.
    sent
        What was sent.
    codec
        What the move itself was encoded in; None: received are the trained values, in
        the model's own type or in float32.
    """
    if codec is not None:
        wire = read_array(name, data, *codec.wire_type(sent.shape))
        return decoded(name, wire, sent.shape, codec)
    values: npt.NDArray[Any] = read_array(
        name, data, sent.shape, sent.dtype, np.dtype(np.float32)
    )
    wide = np.result_type(sent, np.float32)
    move = np.subtract(sent, values, dtype=wide)
    return np.asarray(move, np.float32)


def finite(name: str, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return an array that holds neither NaN nor infinity."""
    if not np.isfinite(values).all():
        raise not_finite(name)
    return values


def not_finite(name: str) -> UpdateRefused:
    """Return what refuses an array with NaN or infinity."""
    return UpdateRefused("non-finite", f"{name} holds NaN or infinity")
