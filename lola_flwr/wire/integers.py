"""Codecs of whole numbers: int8, int4 and int2, with scales of their own."""

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


class _Packed:
    """One of a few levels a value, several in a byte, the earliest in the lowest bits.

    Parameters
    ----------
    levels
        The levels, of which the index travels: 4 or 16.
    """

    def __init__(self, levels: Sequence[int]) -> None:
        self._bits = (len(levels) - 1).bit_length()
        self.in_a_byte = 8 // self._bits
        shifts = np.arange(self.in_a_byte, dtype=np.uint8) * self._bits
        indices = np.arange(256, dtype=np.uint8)[:, np.newaxis] >> shifts
        self._of_byte = np.array(levels, np.float32)[indices & (len(levels) - 1)]

    def nbytes(self, size: int) -> int:
        """Return how many bytes so many values take."""
        return -(-size // self.in_a_byte)

    def pack(self, indices: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Return the bytes of some values' indices; what fills the last one is 0."""
        missing = -indices.size % self.in_a_byte
        if missing:
            indices = np.append(indices, np.zeros(missing, np.uint8))
        # As one word, lowest byte first: each byte's bits move down beside those of the
        # byte below, and the lowest byte is what is wanted.
        words = together = indices.view(f"<u{self.in_a_byte}")
        for place in range(1, self.in_a_byte):
            together = together | words >> place * (8 - self._bits)
        return together.astype(np.uint8)

    def unpack(self, packed: WireArray, size: int) -> Float32Array:
        """Return the levels of so many values."""
        levels: Float32Array = self._of_byte.take(packed.view(np.uint8), axis=0)
        return levels.reshape(-1)[:size]


_GROUP = 64
_LEVELS_OF_4_BITS = 7
_FOUR_BITS = _Packed(range(-8, 8))


class Int4:
    """Four bits a value and one bfloat16 scale for each 64 values in a row.

    A group's scale is its largest magnitude / 7, rounded to bfloat16; every value is
    rounded to the nearest multiple from -7 to 7, so no value is off by more than half a
    scale, but for what rounding the scale takes (0.4 % of the largest). Groups follow
    the array's memory. Travels as bytes: all scales, then all values, two in a byte,
    the earlier one in the lower half, each plus 8.
    """

    has_feedback: ClassVar[bool] = True

    def wire_type(self, shape: Sequence[int]) -> WireType:
        """Tell what travels: 2 bytes a group and half a byte a value."""
        size = math.prod(shape)
        nbytes = 2 * -(-size // _GROUP) + _FOUR_BITS.nbytes(size)
        return WireType((nbytes,), np.dtype(np.uint8))

    def encode(self, values: Float32Array) -> WireArray:
        """Scale every group to whole numbers from -7 to 7."""
        flat = values.ravel()
        number = -(-flat.size // _GROUP)
        wire = np.empty(self.wire_type(values.shape).nbytes, np.uint8)
        scale, packed = wire[: 2 * number].view("<u2"), wire[2 * number :]
        for part in parts(flat.size):
            some = flat[part]
            size, missing = some.size, -some.size % _GROUP
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
                indices = (levels.astype(np.int8) + 8).view(np.uint8)
            together = _FOUR_BITS.pack(indices.reshape(-1)[:size])
            begin = part.start // _FOUR_BITS.in_a_byte
            packed[begin : begin + together.size] = together
        return wire

    def decode(self, wire: WireArray, shape: Sequence[int]) -> Float32Array:
        """Multiply every group by its scale."""
        size = math.prod(shape)
        number = -(-size // _GROUP)
        scale = from_bf16(wire[: 2 * number].view("<u2"))
        values = np.zeros((number, _GROUP), np.float32)
        flat = values.reshape(-1)
        flat[:size] = _FOUR_BITS.unpack(wire[2 * number :], size)
        # What overflows here is refused as not finite.
        with np.errstate(over="ignore", invalid="ignore"):
            values *= scale[:, np.newaxis]
        return flat[:size].reshape(shape)


_TWO_BITS = _Packed((-3, -1, 1, 3))


class Int2:
    """Two bits a value, and one bfloat16 scale for each row and for each column.

    The magnitudes of a weight matrix's gradient are nearly the product of what its row
    and its column have on average (Shazeer, Stern, ICML 2018, keep second moments so):
    scaled by both, values are nearly normal, however much rows and columns differ. The
    best four levels of normal values are about half of their standard deviation and one
    and a half times it from 0 (Max, IRE Transactions on Information Theory 6, 1960): a
    value is -3, -1, 1 or 3 times its scales. Rows' scales are those of least squares,
    so what is left out has a smaller norm than the values whatever they are: with error
    feedback it does not grow without bound. Magnitudes below 1e-19, whose squares
    float32 has none for, may be nothing.

    Arrays of one dimension travel as with int8. Rows of less than 64 values give way to
    columns as there, and only with 64 of both have columns scales, too. Travels as
    bytes: scales of rows, scales of columns, and all values in the order of the rows,
    four in a byte.
    """

    has_feedback: ClassVar[bool] = True

    def wire_type(self, shape: Sequence[int]) -> WireType:
        """Tell what travels: 2 bytes a row and a column, and a quarter a value."""
        if len(shape) < 2:
            return _ONE_DIMENSION.wire_type(shape)
        channels, columns = _both(shape)
        nbytes = 2 * (channels.number + columns) + _TWO_BITS.nbytes(math.prod(shape))
        return WireType((nbytes,), np.dtype(np.uint8))

    def encode(self, values: Float32Array) -> WireArray:
        """Tell small from large in every row and column; fit the rows' scales."""
        if values.ndim < 2:
            return _ONE_DIMENSION.encode(values)
        channels, columns = _both(values.shape)
        rows = channels.rows_of(values)
        number, length = rows.shape
        wire = np.empty(self.wire_type(values.shape).nbytes, np.uint8)
        packed = wire[2 * (number + columns) :]
        scale = wire[: 2 * (number + columns)].view("<u2")
        # What is not finite, or has no square that is, spoils all, and is refused.
        with np.errstate(over="ignore", invalid="ignore"):
            typical = np.einsum("ij,ij->i", rows, rows) / np.float32(length or 1)
            across = np.ones(length, np.float32)
            if columns:
                square = np.einsum("ij,ij->j", rows, rows) / np.float32(number)
                usual = typical.mean()
                scale[number:] = to_bf16(np.sqrt(square / (usual if usual > 0 else 1)))
                across = from_bf16(scale[number:])
            typical = np.sqrt(typical)[:, np.newaxis]
            # Whole bytes at a time.
            at_once = 4 * max(1, VALUES_A_STEP // (4 * max(length, 1)))
            for first in range(0, number, at_once):
                some = slice(first, first + at_once)
                indices, fitted = _quarters(rows[some], typical[some] * across, across)
                scale[some.start : some.start + len(fitted)] = to_bf16(fitted)
                part = _TWO_BITS.pack(indices.reshape(-1))
                begin = first * length // _TWO_BITS.in_a_byte
                packed[begin : begin + part.size] = part
        return wire

    def decode(self, wire: WireArray, shape: Sequence[int]) -> Float32Array:
        """Multiply every level by its row's scale and its column's."""
        shape = tuple(shape)
        if len(shape) < 2:
            return _ONE_DIMENSION.decode(wire, shape)
        channels, columns = _both(shape)
        number = channels.number
        scale = from_bf16(wire[: 2 * (number + columns)].view("<u2"))
        values = _TWO_BITS.unpack(wire[2 * (number + columns) :], math.prod(shape))
        rows = values.reshape(number, -1)
        # What overflows here is refused as not finite.
        with np.errstate(over="ignore", invalid="ignore"):
            rows *= scale[:number, np.newaxis]
            if columns:
                rows *= scale[number:]
        return channels.values_of(rows, shape)


_ONE_DIMENSION = Int8()


def _quarters(
    rows: Float32Array, typical: Float32Array, across: Float32Array
) -> tuple[npt.NDArray[np.uint8], Float32Array]:
    """Return some rows' levels, as indices, and the scales that fit them best.

    Parameters
    ----------
    rows
        The rows.
    typical
        Magnitude of each value from which on its level is an outer one.
    across
        Scale of each column.
    """
    magnitude = np.abs(rows)
    outer = (magnitude > typical).view(np.uint8)
    level = (1 + 2 * outer).astype(np.float32) * across
    squares = np.einsum("ij,ij->i", level, level)
    fitted = np.einsum("ij,ij->i", magnitude, level)
    fitted /= np.where(squares > 0, squares, 1)
    # Of the four levels in rising order, which turns around where both bits do.
    negative = np.multiply(rows < 0, 3, dtype=np.uint8)
    return (2 + outer) ^ negative, fitted


def _both(shape: Sequence[int]) -> tuple[_Channels, int]:
    """Return an array's channels, and how many scales there are across them."""
    channels = _channels(tuple(shape))
    length = math.prod(shape) // max(channels.number, 1)
    several = min(channels.number, length) >= _SHORT_CHANNEL
    return channels, length if several else 0
