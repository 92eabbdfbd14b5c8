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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from lola_flwr.arrays import Float32Array, Float32Arrays, Float64Array, IntArray
from lola_flwr.randomness import rng_for

Sketch = npt.NDArray[np.int16]
Shape = tuple[int, ...]

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
    whole, rest
        How far others agree with it, as far as they are known: with all of it, and
        without the directions in which they vary most. None if they are too few.
    share
        What part it is of what its device sent of its kind: the blocks that a device
        computed on one mini-batch tell of it no more than one block does. None: all.
    """

    device: str
    server_round: int
    sketch: npt.NDArray[np.int16]
    whole: float | None = None
    rest: float | None = None
    share: float | None = None


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
        drawn = _drawn(key, name, gradients[name].shape)
        total += drawn.projected(_evened(drawn.rows_of(gradients[name])))
    return sketch_of(total)


def sketch_of(projected: Float64Array) -> Sketch | None:
    """Return a projection, shape [D], as sketches are kept; None of one of zeros."""
    length = math.sqrt(float(projected @ projected))
    if not length:
        return None
    return np.rint(projected * (_LENGTH / length)).astype(np.int16)


def projection(
    gradients: Float32Arrays, names: Iterable[str], key: int
) -> Float64Array:
    """Return what a sketch is made of, as it is: sums of gradients have their sums.

    Parameters
    ----------
    gradients, names, key
        As for `sketch`.
    """
    total = np.zeros(_SIZE)
    for name in names:
        drawn = _drawn(key, name, gradients[name].shape)
        total += drawn.projected(drawn.rows_of(gradients[name]))
    return total


def rows_looked_at(shapes: Mapping[str, Shape], key: int) -> dict[str, IntArray | None]:
    """Return which rows of parameters' gradients are looked at; None: all.

    Parameters
    ----------
    shapes
        The parameters' shapes.
    key
        As for `sketch`.
    """
    return {name: _drawn(key, name, shape).rows for name, shape in shapes.items()}


def projections(
    rows: Float32Arrays, shapes: Mapping[str, Shape], names: Iterable[str], key: int
) -> Float64Array:
    """Return the projections of many gradients, by their rows that are looked at.

    Parameters
    ----------
    rows
        Of each of R gradients the values of these rows, one after the other: shape
        [R, V] by parameter.
    shapes
        The parameters' shapes.
    names, key
        As for `sketch`.

    Returns
    -------
    What `projection` is of each of them, shape [R, D].
    """
    found = [_drawn(key, n, shapes[n]).of_each(rows[n]) for n in names]
    return np.asarray(np.sum(found, axis=0, dtype=np.float64))


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
    places = np.fromiter(places, int)
    names = np.array([one.device for one in seen])
    rounds = np.array([one.server_round for one in seen])
    # A row for each direction that is meant: what others count, its own device nothing.
    trusted = np.asarray(weights, np.float64) * (names != names[places, None])
    apart = np.abs(rounds - rounds[places, None])
    shares = trusted * np.exp(-apart / _ROUNDS)
    # Who is asked more often is not thereby heard more.
    shares /= np.maximum(shares @ (names[:, None] == names), 1.0)
    most = _variation(products, trusted, left_out)
    of_mean = np.einsum("pn,pnk->pk", shares @ products, most)
    of_own = np.einsum("pn,pnk->pk", products[places], most)
    product = (shares * products[places]).sum(1) - (of_mean * of_own).sum(1)
    mean = ((shares @ products) * shares).sum(1) - np.square(of_mean).sum(1)
    own = products[places, places] - np.square(of_own).sum(1)
    # What rounding leaves of vectors that are all left out has no direction.
    told = (mean > 1e-9 * np.square(shares.sum(1))) & (own > 1e-9)
    told &= (trusted > 0).sum(1) >= _FEWEST
    cosines = product / np.sqrt(np.where(told, mean * own, 1.0))
    return [
        float(np.clip(cosine, -1.0, 1.0)) if known else None
        for cosine, known in zip(cosines, told, strict=True)
    ]


def _variation(
    products: Float64Array, trusted: Float64Array, count: int
) -> Float64Array:
    """Return the directions of greatest variation, as sums of some vectors.

    Parameters
    ----------
    products
        Products of n vectors with each other, shape [n, n].
    trusted
        What each of them counts, in each of p cases, shape [p, n].
    count
        How many directions are meant.

    Returns
    -------
    Weights of the vectors in each of the directions, which are orthonormal, shape
    [p, n, count]; zero where there are not so many.
    """
    if not count:
        return np.zeros((*trusted.shape, 0))
    roots = np.sqrt(trusted)
    squares, sums = np.linalg.eigh(products * roots[:, :, None] * roots[:, None, :])
    first = len(products) - min(count, len(products))
    squares, sums = squares[:, None, first:], sums[:, :, first:] * roots[:, :, None]
    lengths = np.sqrt(np.where(squares > 1e-9, squares, np.inf))
    return np.asarray(sums / lengths)


@dataclass(frozen=True, eq=False)
class _Drawn:
    """What of a parameter's gradient is sketched, and how.

    Parameters
    ----------
    rows
        Rows of it; None: all of them.
    places, signs
        Where in the sketch each value is added, and whether as it is.
    """

    rows: npt.NDArray[np.int64] | None
    places: npt.NDArray[np.uint8]
    signs: npt.NDArray[np.uint8]

    def rows_of(self, gradient: Float32Array) -> Float32Array:
        """Return a gradient as rows, or some of them where it is large."""
        rows = _as_rows(gradient)
        return rows if self.rows is None else np.take(rows, self.rows, axis=0)

    def projected(self, rows: Float32Array) -> Float64Array:
        """Return the sums of values that fall together."""
        flat = rows.reshape(-1)
        signed = np.where(self.signs, flat, -flat)
        sums = np.bincount(self.places, weights=signed, minlength=_SIZE)
        return np.asarray(sums, np.float64)

    def of_each(self, values: Float32Array) -> Float32Array:
        """Return the sums of several gradients, of which each is a row of values."""
        count = len(self.places)
        signs = np.where(self.signs, np.float32(1), np.float32(-1))
        added = (signs, self.places.astype(np.int32), np.arange(count + 1))
        return np.asarray(values @ csr_array(added, shape=(count, _SIZE)))


# A model's parameters, all in each round.
@lru_cache(maxsize=1024)
def _drawn(key: int, name: str, shape: tuple[int, ...]) -> _Drawn:
    rng = rng_for(key, "sketch", name)
    count, width = (shape[0] if shape[1:] else 1), math.prod(shape[1:] or shape)
    rows = None
    if count * width > _VALUES:
        count, of = max(_VALUES // width, 1), count
        rows = np.sort(rng.choice(of, count, replace=False))
    size = count * width
    places = rng.integers(_SIZE, size=size, dtype=np.uint8)
    signs = rng.integers(256, size=-(-size // 8), dtype=np.uint8)
    return _Drawn(rows, places, np.unpackbits(signs, count=size))


def _as_rows(gradient: Float32Array) -> Float32Array:
    return gradient.reshape(len(gradient), -1) if gradient.ndim > 1 else gradient[None]


def _evened(rows: Float32Array) -> Float32Array:
    """Return rows of length 1: a few large ones would hide what others say."""
    length = np.sqrt(np.vecdot(rows, rows, dtype=np.float64))[:, None]
    return np.asarray(rows / np.where(length > 0, length, 1.0), np.float32)
