"""Arrays by the type of their elements: float32 and float64 do not share a name."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

# By the names of parameters.
Float32Arrays = Mapping[str, Float32Array]

# Squares of so many elements are summed in float32, which costs no digit that matters.
_ROW = 256
# Below it, sums of float32 squares may have lost small elements.
_SMALLEST = 1e-24


def squared_norm(values: Float32Array) -> float:
    """Return the square of the Euclidean norm.

    It is finite exactly where all elements are: no square of a float32 is too large
    for a float64.
    """
    flat = values.reshape(-1)
    in_rows = flat.size - flat.size % _ROW
    rows = flat[:in_rows].reshape(-1, _ROW)
    with np.errstate(over="ignore", invalid="ignore"):
        of_rows = float(np.vecdot(rows, rows).sum(dtype=np.float64))
    total = of_rows + _squares(flat[in_rows:])
    if _SMALLEST < total < math.inf:
        return total
    parts = np.array_split(flat, math.ceil(flat.size / (1 << 15)) or 1)
    return sum(map(_squares, parts))


def _squares(values: Float32Array) -> float:
    return float(np.square(values, dtype=np.float64).sum())


def in_one(arrays: Float32Arrays) -> tuple[Float32Array, dict[str, Float32Array]]:
    """Copy arrays into one storage.

    Returns
    -------
    All of them one after the other, in the order of their sorted names; and by name, in
    the order given, views of it.
    """
    flat = np.empty(sum(array.size for array in arrays.values()), np.float32)
    starts, start = {}, 0
    for name in sorted(arrays):
        starts[name] = start
        start += arrays[name].size
    views = {}
    for name, array in arrays.items():
        view = flat[starts[name] : starts[name] + math.prod(array.shape)]
        views[name] = view.reshape(array.shape)
        views[name][...] = array
    return flat, views
