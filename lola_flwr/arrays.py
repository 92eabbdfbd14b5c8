"""Arrays by the type of their elements: float32 and float64 do not share a name."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

# By the names of parameters.
Float32Arrays = Mapping[str, Float32Array]
