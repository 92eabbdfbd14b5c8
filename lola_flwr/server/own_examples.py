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

import numpy as np

from lola_flwr.arrays import Float32Arrays, Float64Array
from lola_flwr.server.directions import projection

# The gradients of the server's examples, one by one, at some trainable values.
ExampleGradients = Callable[[Float32Arrays], Iterable[Float32Arrays]]

# What part of the mean variance is added in all directions.
_RIDGE = 0.1


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


def agreement(update: Float64Array, examples: Float64Array) -> float:
    """Return how far an update agrees with examples, from -1 to 1; 0: not known.

    Parameters
    ----------
    update
        Projection of it, shape [D].
    examples
        Projections of the examples' gradients, shape [R, D].
    """
    mean = examples.mean(axis=0)
    _, sizes, ways = np.linalg.svd(examples - mean, full_matrices=False)
    squares = np.square(sizes)
    added = _RIDGE * squares.mean()
    if not added:
        return 0.0
    # The square root of the inverse, but for a factor: 1 where examples do not vary.
    damped = np.sqrt(added / (squares + added)) - 1.0

    def evened(vector: Float64Array) -> Float64Array:
        return np.asarray(vector + (damped * (ways @ vector)) @ ways)

    one, other = evened(update), evened(mean)
    length = float(np.sqrt((one @ one) * (other @ other)))
    return float(one @ other) / length if length else 0.0
