"""Running statistics of normalization layers, where devices train a whole model.

In training mode a BatchNorm layer keeps running means and variances of its input, for
use in evaluation. No gradient moves them: as under FedAvg, the server's are the mean of
the devices', weighted by examples, or the robust mean that gradients are put together
with. Every device runs every layer forward, so each sends those of all layers, trained
or not.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

_SUFFIXES = ("running_mean", "running_var", "num_batches_tracked")

# Beyond this a device's statistic is not believed; a variance may be its square.
_LARGEST_MEAN = 1e6


def statistics_names(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names in a state dict that are running statistics, in its order."""
    return tuple(name for name in names if name.rpartition(".")[2] in _SUFFIXES)


def is_plausible(name: str, values: npt.NDArray[Any]) -> bool:
    """Tell whether a running statistic can be what a layer has seen."""
    low, high = 0.0, _LARGEST_MEAN**2
    if name.endswith("running_mean"):
        low, high = -_LARGEST_MEAN, _LARGEST_MEAN
    wide = values.astype(np.float64)
    # NaN is within no bounds.
    return bool(((wide >= low) & (wide <= high)).all())


def within_bounds(
    name: str, values: npt.NDArray[Any], dtype: np.dtype[Any]
) -> npt.NDArray[Any]:
    """Return a statistic to which noise was added as one that a layer can use."""
    # NumPy makes numbers of arrays without dimensions.
    bounded = values if name.endswith("running_mean") else np.maximum(values, 0)
    return np.asarray(bounded, dtype=dtype)
