"""Codecs of whole numbers: int8 and int4, with scales of their own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from lola_flwr.arrays import Float32Array
from lola_flwr.wire.npy import WireArray, WireType
from lola_flwr.wire.passes import VALUES_A_STEP, from_bf16, parts, to_bf16

_LEVELS = 127
_SHORT_CHANNEL = 64


class Int8:
    """One byte a value and one float32 scale a channel: a row of a weight matrix.

    A channel's scale is its largest magnitude / 127; every value is rounded to the
    nearest multiple, so no value is off by more than half a scale. Rows of less than
    64 values (as of a low-rank adapter's second factor, where scales would take half as
    much as the values) give way to columns if these are longer; an array of one
    dimension is one channel. Travels as bytes: all scales, then all values.
    """

    has_feedback: ClassVar[bool] = True

    def wire_type(self, shape: Sequence[int]) -> WireType:
        """Tell what travels: 4 bytes a channel and 1 byte a value."""
        channels = _channels(tuple(shape))
        nbytes = 4 * channels.number + math.prod(shape)
        return WireType((nbytes,), np.dtype(np.uint8))

    def encode(self, values: Float32Array) -> WireArray:
        """Scale every channel to whole numbers from -127 to 127."""
        rows = _channels(values.shape).rows_of(values)
        number, length = rows.shape
        wire = np.empty(4 * number + rows.size, np.uint8)
        scale = wire[: 4 * number].view("<f4")
        levels = wire[4 * number :].view(np.int8).reshape(rows.shape)
        at_once = max(1, VALUES_A_STEP // max(length, 1))
        # A value that is not finite spoils its channel, which the server then refuses.
        with np.errstate(invalid="ignore"):
            for first in range(0, number, at_once):
                some = slice(first, first + at_once)
                _to_levels(rows[some], scale[some], levels[some])
        return wire

    def decode(self, wire: WireArray, shape: Sequence[int]) -> Float32Array:
        """Multiply every channel by its scale."""
        shape = tuple(shape)
        channels = _channels(shape)
        scale = wire[: 4 * channels.number].view("<f4")
        levels = wire[4 * channels.number :].view(np.int8)
        rows = levels.reshape(channels.number, -1)
        # What overflows here is refused as not finite.
        with np.errstate(over="ignore", invalid="ignore"):
            values = rows * scale.astype(np.float32)[:, np.newaxis]
        return channels.values_of(values, shape)


def _to_levels(
    rows: Float32Array, scale: Float32Array, levels: npt.NDArray[np.int8]
) -> None:
    """Fill in some channels' scales and whole numbers."""
    largest: Float32Array = np.zeros(len(rows), np.float32)
    steps = list(parts(rows.shape[1]))
    for part in steps:
        np.maximum(largest, np.abs(rows[:, part]).max(axis=1), out=largest)
    scale[:] = largest / _LEVELS
    divisor = np.where(scale > 0, scale, 1)[:, np.newaxis]
    for part in steps:
        numbers = rows[:, part] / divisor
        np.rint(numbers, out=numbers)
        # A scale below the normal numbers is too coarse for its own channel.
        np.clip(numbers, -_LEVELS, _LEVELS, out=numbers)
        levels[:, part] = numbers


class _Channels(NamedTuple):
    """The channels of an array: its rows, or its columns."""

    number: int
    are_columns: bool

    def rows_of(self, values: Float32Array) -> Float32Array:
        if self.are_columns:
            return np.ascontiguousarray(values.reshape(-1, self.number).T)
        return values.reshape(self.number, -1)

    def values_of(self, rows: Float32Array, shape: tuple[int, ...]) -> Float32Array:
        return np.ascontiguousarray(rows.T if self.are_columns else rows).reshape(shape)


def _channels(shape: tuple[int, ...]) -> _Channels:
    if len(shape) < 2 or 0 in shape:
        return _Channels(1, are_columns=False)
    length = math.prod(shape[1:])
    if length < min(_SHORT_CHANNEL, shape[0]):
        return _Channels(length, are_columns=True)
    return _Channels(shape[0], are_columns=False)


_GROUP = 64
_LEVELS_OF_4_BITS = 7


class Int4:
    """Four bits a value and one bfloat16 scale for each 64 values in a row.

    A group's scale is its largest magnitude / 7, rounded to bfloat16; every value is
    rounded to the nearest multiple from -7 to 7, so no value is off by more than half a
    scale, but for what rounding the scale takes (0.4 % of the largest). Groups follow
    the array's memory; the last is filled up with zeros. Travels as bytes: all scales,
    then all values, two in a byte, the earlier one in the lower half, each plus 8.
    """

    has_feedback: ClassVar[bool] = True

    def wire_type(self, shape: Sequence[int]) -> WireType:
        """Tell what travels: 2 bytes a group and half a byte a value."""
        size = math.prod(shape)
        nbytes = 2 * -(-size // _GROUP) + -(-size // 2)
        return WireType((nbytes,), np.dtype(np.uint8))

    def encode(self, values: Float32Array) -> WireArray:
        """Scale every group to whole numbers from -7 to 7."""
        flat = values.ravel()
        number = -(-flat.size // _GROUP)
        wire = np.empty(self.wire_type(values.shape).nbytes, np.uint8)
        scale, packed = wire[: 2 * number].view("<u2"), wire[2 * number :]
        for part in parts(flat.size):
            some = flat[part]
            missing = -some.size % _GROUP
            if missing:
                some = np.append(some, np.zeros(missing, np.float32))
            groups = some.reshape(-1, _GROUP)
            first = part.start // _GROUP
            # A value that is not finite spoils its group, which the server refuses.
            with np.errstate(invalid="ignore"):
                scales = to_bf16(np.abs(groups).max(axis=1) / _LEVELS_OF_4_BITS)
                scale[first : first + len(groups)] = scales
                divisor = from_bf16(scales)
                divisor = np.where(divisor > 0, divisor, 1)[:, np.newaxis]
                levels = np.rint(groups / divisor)
                np.clip(levels, -_LEVELS_OF_4_BITS, _LEVELS_OF_4_BITS, out=levels)
                pairs = (levels.astype(np.int8) + 8).view(np.uint8).reshape(-1, 2)
            both = pairs[:, 0] | pairs[:, 1] << 4
            to = packed[part.start // 2 : part.start // 2 + both.size]
            to[:] = both[: to.size]
        return wire

    def decode(self, wire: WireArray, shape: Sequence[int]) -> Float32Array:
        """Multiply every group by its scale."""
        size = math.prod(shape)
        number = -(-size // _GROUP)
        scale = from_bf16(wire[: 2 * number].view("<u2"))
        packed = wire[2 * number :].astype(np.uint8, copy=False)
        values = np.zeros((number, _GROUP), np.float32)
        flat = values.reshape(-1)
        flat[0 : 2 * packed.size : 2] = (packed & 15).astype(np.int8) - 8
        flat[1 : 2 * packed.size : 2] = (packed >> 4).astype(np.int8) - 8
        # What overflows here is refused as not finite.
        with np.errstate(over="ignore", invalid="ignore"):
            values *= scale[:, np.newaxis]
        return flat[:size].reshape(shape)
