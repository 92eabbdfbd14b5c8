"""Put the devices' block gradients together into one gradient of the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from lola_flwr.arrays import Float32Array, Float32Arrays
from lola_flwr.errors import UserError

# The mean of a stack of arrays along its first axis.
StackMean = Callable[[npt.NDArray[Any]], npt.NDArray[np.floating]]


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
    norm
        Euclidean norm of the gradients as they were received, before any clipping.
    zeroth_order
        Whether the gradient is an estimate from a few of its projections.
    """

    gradients: Mapping[str, npt.NDArray[np.float32]]
    num_examples: int
    statistics: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    norm: float = math.nan
    zeroth_order: bool = False

    def scaled(self, scale: float) -> BlockUpdate:
        """Return the update with gradients of another size."""
        gradients = {
            n: (g * scale).astype(np.float32, copy=False)
            for n, g in self.gradients.items()
        }
        return replace(self, gradients=gradients)


def block_mean_named(name: str) -> Callable[[Sequence[BlockUpdate]], Float32Arrays]:
    """Return what averages, per parameter, the gradients of those that computed it.

    Parameters
    ----------
    name
        Name of the mean. ``"mean"`` is weighted by examples. The others are robust, and
        coordinate-wise: ``"median"``, and ``"trimmed"``, which leaves out the largest
        and the smallest third (Yin et al., "Byzantine-Robust Distributed Learning:
        Towards Optimal Statistical Rates", ICML 2018). They do not believe the devices'
        examples, and they are the plain mean of two updates.

    Returns
    -------
    A function from one round's updates, each of at least one example, to the gradient
    of every parameter that some update holds; where it is the only one, that is its own
    array. A parameter that nobody computed has no entry, and the optimizer leaves it
    alone.

    Raises
    ------
    UserError
        Unknown name; the message lists the known ones.
    """
    if name not in _MEANS:
        raise UserError(
            f"block_mean={name!r} is unknown; choose from {', '.join(_MEANS)}."
        )
    return _MEANS[name]


def _weighted_mean(updates: Sequence[BlockUpdate]) -> Float32Arrays:
    examples: dict[str, int] = {}
    for update in updates:
        for name in update.gradients:
            examples[name] = examples.get(name, 0) + update.num_examples
    total: dict[str, Float32Array] = {}
    for update in updates:
        for name, gradient in update.gradients.items():
            if update.num_examples == examples[name]:
                # Its only one, which stays where it was received.
                total[name] = gradient
                continue
            weight = np.float32(update.num_examples / examples[name])
            if name in total:
                total[name] += weight * gradient
            else:
                total[name] = weight * gradient
    return total


def _coordinate_wise(
    updates: Sequence[BlockUpdate], *, mean: StackMean
) -> Float32Arrays:
    """Return ``mean`` of each parameter's gradients, stacked."""
    names = dict.fromkeys(name for update in updates for name in update.gradients)
    return {
        name: mean(
            np.stack([u.gradients[name] for u in updates if name in u.gradients])
        ).astype(np.float32)
        for name in names
    }


def _median(stack: npt.NDArray[Any]) -> npt.NDArray[np.floating]:
    return np.asarray(np.median(stack, axis=0))


def _trimmed_mean(stack: npt.NDArray[Any]) -> npt.NDArray[np.floating]:
    # scipy.stats takes longer to import than the rest of the package together.
    from scipy.stats import trim_mean

    return np.asarray(trim_mean(stack, 1 / 3, axis=0))


ROBUST_MEANS: dict[str, StackMean] = {"median": _median, "trimmed": _trimmed_mean}
_MEANS: dict[str, Callable[[Sequence[BlockUpdate]], Float32Arrays]] = {
    "mean": _weighted_mean,
    **{
        name: partial(_coordinate_wise, mean=mean)
        for name, mean in ROBUST_MEANS.items()
    },
}
BLOCK_MEANS = tuple(_MEANS)


def average_statistics(
    updates: Sequence[BlockUpdate], block_mean: str = "mean"
) -> dict[str, npt.NDArray[Any]]:
    """Average the devices' statistics.

    Parameters
    ----------
    updates
        Updates of one round.
    block_mean
        Name of the mean, as of `block_mean_named`: ``"mean"`` is weighted by examples.

    Returns
    -------
    Mean of each statistic over the updates that hold it, of the type it came in.
    """
    means: dict[str, npt.NDArray[Any]] = {}
    for name in {name: None for update in updates for name in update.statistics}:
        holding = [update for update in updates if name in update.statistics]
        values = [update.statistics[name] for update in holding]
        if block_mean == "mean":
            weights = [update.num_examples for update in holding]
            mean = np.average(values, axis=0, weights=weights)
        else:
            mean = ROBUST_MEANS[block_mean](np.stack(values))
        if np.issubdtype(values[0].dtype, np.integer):
            mean = np.rint(mean)
        means[name] = np.asarray(mean, dtype=values[0].dtype)
    return means
