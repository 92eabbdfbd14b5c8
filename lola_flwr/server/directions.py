"""How far a device's gradient points where others' point, round by round.

Gradients of single mini-batches are mostly noise, and where devices' classes differ,
they differ most in what their own classes pull at: in the directions in which a block's
latest gradients vary most. What is left without these is compared: a gradient with
those that other devices sent of the same block shortly before and after. One such
comparison tells little, ten or twenty of one device do.

Kept of a gradient is a sketch of a few hundred numbers [1]_. Cosines of sketches are
those of the gradients but for a few hundredths.

References
----------
.. [1] Charikar, Chen, Farach-Colton, "Finding Frequent Items in Data Streams", ICALP
   2002.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lola_flwr.arrays import Float32Array, Float32Arrays, Float64Array
from lola_flwr.randomness import rng_for

Sketch = npt.NDArray[np.int16]

# Values of a parameter that a sketch is of: rows of it, drawn once. Far fewer than a
# layer has tell a direction, and each costs time in every round.
_VALUES = 1 << 14
# Numbers of a sketch, and its length: whole numbers, so that a checkpoint is exact.
_SIZE, _LENGTH = 256, 4000.0
# Others that a direction is compared with, at least.
_FEWEST = 6
# Rounds over which gradients are compared: those of later ones weigh 1/e.
_ROUNDS = 3.0


@dataclass(frozen=True, eq=False)
class Direction:
    """Where one update of a block, or of the head, points.

    Parameters
    ----------
    device
        Name of its device.
    server_round
        Its round.
    sketch
        A sketch of it.
    agreement
        How far others agree with it, as far as they are known; None if not at all.
    """

    device: str
    server_round: int
    sketch: npt.NDArray[np.int16]
    agreement: float | None = None


def sketch(gradients: Float32Arrays, names: Iterable[str], key: int) -> Sketch | None:
    """Return a sketch of some parameters' gradient; None of one that is zero.

    Parameters
    ----------
    gradients
        Gradients by parameter.
    names
        Those that are meant.
    key
        What the sketch is drawn by: who knows it can hide from those who look at
        sketches.
    """
    total = np.zeros(_SIZE)
    for name in names:
        rng = rng_for(key, "sketch", name)
        flat = _evened(_some_rows(gradients[name], rng)).reshape(-1)
        places = rng.integers(_SIZE, size=flat.size, dtype=np.uint8)
        signs = np.unpackbits(
            rng.integers(256, size=-(-flat.size // 8), dtype=np.uint8), count=flat.size
        )
        signed = np.where(signs, flat, -flat)
        total += np.bincount(places, weights=signed, minlength=_SIZE)
    length = math.sqrt(float(total @ total))
    if not length:
        return None
    return np.rint(total * (_LENGTH / length)).astype(np.int16)


def agreements(
    seen: Sequence[Direction],
    weights: Sequence[float],
    places: Iterable[int],
    *,
    left_out: int,
) -> list[float | None]:
    """Return how far some gradients point where others point, from -1 to 1.

    Parameters
    ----------
    seen
        Directions of one block, by the order in which they came.
    weights
        How far each one's device is trusted, 0 to 1.
    places
        Which of them are meant.
    left_out
        In how many directions, those of greatest variation, nothing is compared.

    Returns
    -------
    For each the cosine of the angle to the mean of other devices' of about the same
    time, without the directions in which these vary most; None where there are too few.
    """
    stack = np.stack([one.sketch for one in seen]).astype(np.float64) / _LENGTH
    products = stack @ stack.T
    return [
        _agreement(products, seen, np.asarray(weights, np.float64), place, left_out)
        for place in places
    ]


def _agreement(
    products: Float64Array,
    seen: Sequence[Direction],
    weights: Float64Array,
    place: int,
    left_out: int,
) -> float | None:
    """Return one direction's agreement, by the products of all with each other."""
    own = seen[place]
    others = [
        n for n, one in enumerate(seen) if one.device != own.device and weights[n] > 0
    ]
    if len(others) < _FEWEST:
        return None
    trusted = np.sqrt(weights[others])
    between = products[np.ix_(others, others)]
    # Directions of variation, as sums of the others.
    squares, sums = np.linalg.eigh(between * np.outer(trusted, trusted))
    kept = squares[-left_out:] > 1e-9
    most = (sums[:, -left_out:] * trusted[:, None])[:, kept]
    most = most / np.sqrt(squares[-left_out:][kept])
    apart = np.abs([seen[n].server_round - own.server_round for n in others])
    shares = weights[others] * np.exp(-apart / _ROUNDS)
    to_others = products[place, others]
    of_mean, of_own = shares @ between @ most, to_others @ most
    product = shares @ to_others - of_mean @ of_own
    squared_mean = shares @ between @ shares - of_mean @ of_mean
    squared_own = products[place, place] - of_own @ of_own
    # What rounding leaves of vectors that are all left out has no direction.
    if squared_mean <= 1e-9 * shares.sum() ** 2 or squared_own <= 1e-9:
        return None
    cosine = product / math.sqrt(squared_mean * squared_own)
    return float(np.clip(cosine, -1.0, 1.0))


def _some_rows(gradient: Float32Array, rng: np.random.Generator) -> Float32Array:
    """Return a gradient as rows, or some of them where it is large."""
    rows = gradient.reshape(len(gradient), -1) if gradient.ndim > 1 else gradient[None]
    if rows.size <= _VALUES:
        return rows
    kept = max(_VALUES // rows.shape[1], 1)
    return np.take(rows, np.sort(rng.choice(len(rows), kept, replace=False)), axis=0)


def _evened(rows: Float32Array) -> Float32Array:
    """Return rows of length 1: a few large ones would hide what others say."""
    length = np.sqrt(np.vecdot(rows, rows, dtype=np.float64))[:, None]
    return np.asarray(rows / np.where(length > 0, length, 1.0), np.float32)
