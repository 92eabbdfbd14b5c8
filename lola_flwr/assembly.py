"""Put the devices' block gradients together into one gradient of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArrays = dict[str, npt.NDArray[np.float32]]


@dataclass(frozen=True, eq=False)
class BlockUpdate:
    """One device's accepted update.

    Parameters
    ----------
    gradients
        Mean gradient of each parameter of its block and of the head.
    num_examples
        Examples that the mean is over; the update's weight.
    statistics
        The device's running statistics, if it sent any.
    """

    gradients: Mapping[str, npt.NDArray[np.float32]]
    num_examples: int
    statistics: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)


def assemble_gradient(updates: Sequence[BlockUpdate]) -> FloatArrays:
    """Average, per parameter, the gradients of the devices that computed it.

    Parameters
    ----------
    updates
        Updates of one round, each of at least one example.

    Returns
    -------
    Gradient of every parameter that some update holds: the mean over those updates,
    weighted by examples. A parameter that nobody computed has no entry, so that the
    optimizer leaves it alone.
    """
    examples: dict[str, int] = {}
    for update in updates:
        for name in update.gradients:
            examples[name] = examples.get(name, 0) + update.num_examples
    total: FloatArrays = {}
    for update in updates:
        for name, gradient in update.gradients.items():
            weight = np.float32(update.num_examples / examples[name])
            if name in total:
                total[name] += weight * gradient
            else:
                total[name] = weight * gradient
    return total
