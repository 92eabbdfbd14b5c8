"""Passes over large arrays, in parts that stay in the CPU's cache."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from ml_dtypes import bfloat16

from lola_flwr.arrays import Float32Array, IntArray

# Values of one step of a pass over an array: its tables stay in the CPU's cache.
VALUES_A_STEP = 1 << 16


def parts(size: int) -> Iterator[slice]:
    """Cut a pass over an array into steps."""
    for first in range(0, size, VALUES_A_STEP):
        yield slice(first, first + VALUES_A_STEP)


# Values of the sample that tells which are large.
_SAMPLE = 1 << 15

_NAN, _MINUS_INFINITY = 0x7FC0, 0xFF80


def to_bf16(values: Float32Array) -> npt.NDArray[np.uint16]:
    """Round to bfloat16, given as its bits."""
    flat = values.ravel()
    wire = np.empty(flat.size, np.uint16)
    for part in parts(flat.size):
        # Rounds to nearest, ties to even; what overflows is infinite.
        with np.errstate(over="ignore", invalid="ignore"):
            wire[part].view(bfloat16)[:] = flat[part]
        # All NaNs are one: those that are negative are above minus infinity's bits.
        if wire[part].max() > _MINUS_INFINITY:
            wire[part][wire[part] > _MINUS_INFINITY] = _NAN
    return wire.reshape(values.shape)


def from_bf16(wire: npt.NDArray[np.generic]) -> Float32Array:
    """Return the numbers of such bits."""
    return (wire.astype(np.uint32) << np.uint32(16)).view(np.float32)


def where_largest(flat: Float32Array, kept: int) -> IntArray:
    """Return where the values of largest magnitude stand, in rising order.

    A sample tells between which two magnitudes the least of them is; what is above is
    taken, and only what is between is put in order. Where the sample misleads, or where
    which of several equal values to take is the order's to say, all are.
    """
    size = flat.size
    if size <= VALUES_A_STEP:
        return _in_order(np.abs(flat), kept)
    # Every odd number of values is of every column in turn.
    sample = np.sort(np.abs(flat[:: size // _SAMPLE | 1]))
    least = sample.size * (1 - kept / size)
    # Four standard deviations of how many of the sample are above.
    error = 4 * math.sqrt(least * (kept / size)) + 4
    low = sample[max(int(least - error), 0)]
    high = sample[min(int(least + error), sample.size - 1)]
    found, magnitudes = [], []
    room = np.empty(VALUES_A_STEP, np.float32)
    for part in parts(size):
        values = flat[part]
        magnitude = np.abs(values, out=room[: values.size])
        near = np.flatnonzero(~(magnitude < low))  # NaN is largest
        magnitudes.append(magnitude[near])
        found.append(near + part.start)
    positions, magnitude = np.concatenate(found), np.concatenate(magnitudes)
    taken = ~(magnitude <= high)
    between = np.flatnonzero(~taken)
    missing = kept - (positions.size - between.size)
    if 0 < missing <= between.size:
        order = between[_in_order(magnitude[between], missing)]
        taken[order] = True
        if np.count_nonzero(magnitude >= magnitude[order].min()) == kept:
            kept_positions: IntArray = positions[taken]
            return kept_positions
    return _in_order(np.abs(flat), kept)


def _in_order(magnitude: Float32Array, kept: int) -> IntArray:
    first = magnitude.size - kept
    return np.sort(np.argpartition(magnitude, first)[first:])
