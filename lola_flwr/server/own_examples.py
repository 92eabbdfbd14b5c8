"""How far a device's gradient points where the server's own examples point.

The mean gradient g of some examples of the server's tells where a mini-batch of an
honest device points, too, but for noise; and most noise is along few directions, in
which examples differ from each other: where those of one class pull the model against
those of another. So these count less. With C the covariance of the examples' gradients,
and l a tenth of its mean variance, an update u agrees by the cosine of the angle
between

    (C + l) ** (-1 / 2) * u    and    (C + l) ** (-1 / 2) * g,

which is the direction that tells honest mini-batches best from others (Fisher's linear
discriminant), regularized. Nothing is trained on these examples.

References
----------
.. [1] Cao, Fang, Liu, Gong, "FLTrust: Byzantine-robust Federated Learning via Trust
   Bootstrapping", arXiv:2012.13995.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lola_flwr.arrays import Float32Arrays, Float64Array
from lola_flwr.server.directions import projection

# The gradients of the server's examples, one by one, at some trainable values.
ExampleGradients = Callable[[Float32Arrays], Iterable[Float32Arrays]]

# What part of the mean variance is added in all directions.
_RIDGE = 0.1
# What rounding leaves of directions in which examples do not differ.
_ROUNDING = 1e-12
# Examples are compared with each other in so many parts.
_QUARTERS = 4


def projected_examples(
    gradients: Iterable[Float32Arrays], parts: Mapping[int, Sequence[str]], key: int
) -> dict[int, Float64Array]:
    """Return projections of the examples' gradients, [R, D] by part of the model.

    Parameters
    ----------
    gradients
        Gradient of each example; one at a time is kept.
    parts
        Names of the parameters of each part.
    key
        As in `lola_flwr.server.directions.sketch`.
    """
    of_part: dict[int, list[Float64Array]] = {part: [] for part in parts}
    for gradient in gradients:
        for part, names in parts.items():
            of_part[part].append(projection(gradient, names, key))
    return {part: np.stack(rows) for part, rows in of_part.items() if rows}


@dataclass(frozen=True, eq=False)
class ExampleMean:
    """Where examples of the server's point, all together.

    Parameters
    ----------
    ways
        Directions in which they differ from their mean, orthonormal, shape [R, D].
    damped
        By what part, less one, a vector's length along each of these counts, [R].
    mean
        Their mean, evened, shape [D].
    """

    ways: Float64Array
    damped: Float64Array
    mean: Float64Array

    @classmethod
    def of(cls, examples: Float64Array) -> ExampleMean | None:
        """Tell it from the projections of their gradients; None where all are alike.

        Parameters
        ----------
        examples
            Projections of the examples' gradients, shape [R, D].
        """
        mean = examples.mean(axis=0)
        apart = examples - mean
        # By products of the examples, which are fewer than the numbers of each.
        squares, sums = np.linalg.eigh(apart @ apart.T)
        squares = np.maximum(squares, 0.0)
        added = _RIDGE * squares.sum() / min(apart.shape)
        if not added:
            return None
        known = squares > _ROUNDING * squares.max()
        squares = squares[known]
        ways = (sums[:, known] / np.sqrt(squares)).T @ apart
        # The square root of the inverse, but for a factor: 1 where they do not vary.
        damped = np.sqrt(added / (squares + added)) - 1.0
        return cls(ways, damped, _evened(mean, ways, damped))

    def agreement(self, update: Float64Array) -> float:
        """Return how far an update's projection agrees, from -1 to 1."""
        one = _evened(update, self.ways, self.damped)
        length = float(np.sqrt((one @ one) * (self.mean @ self.mean)))
        return float(one @ self.mean) / length if length else 0.0


def _evened(
    vector: Float64Array, ways: Float64Array, damped: Float64Array
) -> Float64Array:
    return np.asarray(vector + (damped * (ways @ vector)) @ ways)


def agreements_among(examples: Float64Array) -> list[float]:
    """Return how far each quarter of the examples agrees with the others.

    Parameters
    ----------
    examples
        Projections of the examples' gradients, shape [R, D].
    """
    found = []
    for first in range(_QUARTERS):
        one = np.arange(len(examples)) % _QUARTERS == first
        if one.any() and (others := ExampleMean.of(examples[~one])) is not None:
            found.append(others.agreement(examples[one].mean(axis=0)))
    return found
