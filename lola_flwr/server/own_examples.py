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

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from lola_flwr.arrays import Float32Arrays, Float64Array, IntArray
from lola_flwr.server.directions import projections, rows_looked_at

Sketches = npt.NDArray[np.int16]

# What part of the mean variance is added in all directions.
_RIDGE = 0.1
# Examples are compared with each other in so many parts.
_QUARTERS = 4
# Every example is computed anew once in so many rounds.
_ROUNDS = 4
# Of a sketch.
_LENGTH = 4000.0


class ExampleGradients(Protocol):
    """Gradients of the server's examples, one by one, as far as they are looked at."""

    @property
    def count(self) -> int:
        """How many examples there are."""
        ...

    @property
    def groups(self) -> IntArray:
        """The number of each example's group, of classes for instance, [R], from 0."""
        ...

    def __call__(
        self,
        values: Float32Arrays,
        chosen: IntArray,
        rows: Mapping[str, IntArray | None],
    ) -> Float32Arrays:
        """Compute those of some examples.

        Parameters
        ----------
        values
            The trainable values at which they are meant.
        chosen
            Numbers of R examples, from 0.
        rows
            Which rows of each parameter's gradient; None: all.

        Returns
        -------
        By parameter: of each example the V values of these rows, one after the other,
        shape [R, V].
        """
        ...


@dataclass(frozen=True, eq=False)
class Pulls:
    """Where examples pull at a part of the model, each as it was computed last.

    Whole numbers, so that a checkpoint holds just what a run goes on with.

    Parameters
    ----------
    sketches
        Projections of R gradients, of about one length, shape [R, D].
    lengths
        Their lengths, [R].
    """

    sketches: Sketches
    lengths: Float64Array

    @classmethod
    def of(cls, projected: Float64Array) -> Pulls:
        """Take in projections, shape [R, D]."""
        # What a model that has diverged says points nowhere.
        is_number = np.isfinite(projected).all(axis=1, keepdims=True)
        projected = np.where(is_number, projected, 0.0)
        lengths = np.sqrt(np.vecdot(projected, projected))
        scale = _LENGTH / np.where(lengths > 0, lengths, 1.0)
        return cls(np.rint(projected * scale[:, None]).astype(np.int16), lengths)

    def with_new(self, chosen: IntArray, projected: Float64Array) -> Pulls:
        """Take in some anew: those of these numbers."""
        new = Pulls.of(projected)
        sketches, lengths = self.sketches.copy(), self.lengths.copy()
        sketches[chosen], lengths[chosen] = new.sketches, new.lengths
        return Pulls(sketches, lengths)

    @property
    def projections(self) -> Float64Array:
        """The gradients' projections, shape [R, D]."""
        return self.sketches * (self.lengths[:, None] / _LENGTH)


def pulls_after(
    known: Mapping[int, Pulls],
    gradients: ExampleGradients,
    values: Float32Arrays,
    parts: Mapping[int, Sequence[str]],
    *,
    server_round: int,
    key: int,
) -> dict[int, Pulls]:
    """Return where examples pull, of which a part is computed anew in each round.

    A model moves little in a few rounds: where a quarter of 64 examples is of this
    round, and the others are of the three before, how far an honest device agrees with
    them is 0.87 times as far from nothing, in deviations, as where all are of this
    round (`make attacks`), at a quarter of what that costs.

    Parameters
    ----------
    known
        As it was after the round before, by part of the model.
    gradients, values
        The examples' gradients, at this round's values.
    parts
        Names of the parameters of each part of the model. One of which nothing is
        trained, as an output layer under adapters, has no pulls.
    server_round
        The round.
    key
        As in `lola_flwr.server.directions.sketch`.
    """
    parts = {part: names for part, names in parts.items() if names}
    every = np.arange(gradients.count)
    chosen = np.array_split(every, _ROUNDS)[server_round % _ROUNDS]
    is_known = known.keys() == parts.keys() and all(
        len(pulls.lengths) == len(every) for pulls in known.values()
    )
    if not is_known:
        chosen = every
    if not len(chosen):
        return dict(known)
    shapes = {name: values[name].shape for names in parts.values() for name in names}
    found = gradients(values, chosen, rows_looked_at(shapes, key))
    projected = {
        part: projections(found, shapes, names, key) for part, names in parts.items()
    }
    if not is_known:
        return {part: Pulls.of(new) for part, new in projected.items()}
    return {part: known[part].with_new(chosen, new) for part, new in projected.items()}


@dataclass(frozen=True, eq=False)
class ExampleMean:
    """Where examples of the server's point, all together.

    By products of the examples, which are fewer than the numbers of each: but for the
    factor l, (C + l)^-1 is 1 - A'(AA' + l)^-1 A, where A are their deviations from the
    mean [1]_.

    Parameters
    ----------
    mean
        Their mean, shape [D].
    apart
        By what each deviates from it, shape [R, D].
    inverse
        Of these deviations' products with each other, l added; shape [R, R].

    References
    ----------
    .. [1] Woodbury, "Inverting Modified Matrices", Princeton 1950.
    """

    mean: Float64Array
    apart: Float64Array
    inverse: Float64Array

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
        products = apart @ apart.T
        added = _RIDGE * float(products.trace()) / min(apart.shape)
        if not added:
            return None
        return cls(mean, apart, np.linalg.inv(products + added * np.eye(len(apart))))

    def agreement(self, update: Float64Array) -> float:
        """Return how far an update's projection agrees, from -1 to 1."""
        own, other = self._evened(update), self._evened(self.mean)
        length = math.sqrt(max(float(own @ update) * float(other @ self.mean), 0.0))
        return float(own @ self.mean) / length if length else 0.0

    def cosines(self, updates: Float64Array) -> Float64Array:
        """Return how far N projections, shape [N, D], agree with each other, [N, N]."""
        products = updates @ np.stack([self._evened(one) for one in updates]).T
        lengths = np.sqrt(np.maximum(products.diagonal(), 0.0))
        scale = np.outer(lengths, lengths)
        found: Float64Array = products / np.where(scale > 0, scale, np.inf)
        return found

    def beyond(self, means: Float64Array, updates: Float64Array) -> Float64Array:
        """Return what of updates is not as some means are, or sums of them.

        Parameters
        ----------
        means
            Projections of G means, shape [G, D].
        updates
            Projections of N updates, shape [N, D].
        """
        evened = np.stack([self._evened(mean) for mean in means])
        parts, *_ = np.linalg.lstsq(evened @ means.T, evened @ updates.T)
        rest: Float64Array = updates - parts.T @ means
        return rest

    def _evened(self, vector: Float64Array) -> Float64Array:
        """Return (C + l)^-1 times a vector, but for the factor l."""
        return vector - (self.inverse @ (self.apart @ vector)) @ self.apart


@dataclass(frozen=True, eq=False)
class Groups:
    """Groups of examples, and last all of them together.

    Parameters
    ----------
    sizes
        Examples of each of G groups, and all, shape [G + 1].
    means
        Means of their gradients' projections, shape [G + 1, D].
    variances
        Mean squared distances from these, shape [G + 1].
    """

    sizes: IntArray
    means: Float64Array
    variances: Float64Array

    @classmethod
    def of(cls, examples: Float64Array, groups: IntArray) -> Groups:
        """Tell them from projections of gradients, [R, D], and their numbers, [R]."""
        parts = [*(examples[groups == n] for n in np.unique(groups)), examples]
        means = np.stack([part.mean(axis=0) for part in parts])
        variances = [
            np.square(part - mean).sum(axis=1).mean()
            for part, mean in zip(parts, means, strict=True)
        ]
        return cls(np.array([len(p) for p in parts]), means, np.array(variances))


def agreements_among(examples: Float64Array, batch_size: int) -> list[float]:
    """Return how far some of the examples agree with the others, as a device might.

    Four times as many as a mini-batch has, a quarter of all at most: where mini-batches
    are small, honest devices agree less.

    Parameters
    ----------
    examples
        Projections of the examples' gradients, shape [R, D].
    batch_size
        Examples of a device's mini-batch.
    """
    found = []
    numbers = np.arange(len(examples))
    for first in range(min(_QUARTERS, len(examples))):
        quarter = numbers[first::_QUARTERS]
        # Of those that were computed in different rounds.
        some = quarter[:: max(len(quarter) // batch_size, 1)][:batch_size]
        others = ExampleMean.of(np.delete(examples, some, axis=0))
        if others is not None:
            found.append(others.agreement(examples[some].mean(axis=0)))
    return found
