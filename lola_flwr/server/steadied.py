"""Steady a block's move, of which few of a round's devices tell, by the last round's.

The mean of those devices that return a block is off from that of all. Their spread
tells by how much: with weights w that sum to 1, moves d and mean m of k of K devices,

    noise = (1 - k / K) * sum(w ** 2) * sum(w * |d - m| ** 2) / (1 - sum(w ** 2)).

How far m is from the last round's move is this noise, and what has really changed. Of
the way from the last move to m the part is taken that is no noise, max(0, 1 - noise /
|m - last| ** 2): the shrinkage of James and Stein, towards the last move. A block that
all devices return is moved by their mean, whatever went before.

References
----------
.. [1] James, Stein, "Estimation with Quadratic Loss", Proc. Fourth Berkeley Symposium
   on Mathematical Statistics and Probability, 1961.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from lola_flwr.arrays import Float32Arrays
from lola_flwr.server.assembly import BlockUpdate


def steadied(
    mean: Mapping[str, npt.NDArray[np.float32]],
    last: Mapping[str, npt.NDArray[np.float32]],
    updates: Sequence[BlockUpdate],
    blocks: Iterable[Sequence[str]],
) -> Float32Arrays:
    """Return a round's moves, those of blocks that few devices return steadied.

    Parameters
    ----------
    mean
        Mean move of each parameter that some update holds, by name.
    last
        What the round before was given by this function.
    updates
        The round's updates.
    blocks
        Names of each block's parameters.
    """
    moves = dict(mean)
    for block in blocks:
        names = [name for name in block if name in mean and name in last]
        holding = [u for u in updates if names and names[0] in u.gradients]
        # Of the only device nothing tells how far it is off.
        if not 1 < len(holding) < len(updates):
            continue
        weights = np.array([u.num_examples for u in holding], np.float64)
        weights /= weights.sum()
        squared = float(np.square(weights).sum())
        spread = sum(
            weight * _distance(update.gradients, mean, names)
            for weight, update in zip(weights, holding, strict=True)
        )
        missing = 1 - len(holding) / len(updates)
        noise = missing * squared * spread / (1 - squared)
        way = _distance(mean, last, names)
        part = np.float32(max(0.0, 1 - noise / way) if way else 1.0)
        for name in names:
            moves[name] = last[name] + part * (mean[name] - last[name])
    return moves


def _distance(
    some: Mapping[str, npt.NDArray[np.float32]],
    others: Mapping[str, npt.NDArray[np.float32]],
    names: Iterable[str],
) -> float:
    """Return the square of the Euclidean distance."""
    return sum(
        float(np.square(some[name] - others[name], dtype=np.float64).sum())
        for name in names
    )
