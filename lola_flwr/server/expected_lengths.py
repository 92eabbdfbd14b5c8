"""How long an update may be, by the server's own examples.

Where a model leans to one class, a mini-batch of another has a gradient far longer than
is usual: a device that holds that class is not hostile, and it is the one that is
needed. So an update is told from what each group of examples (a class) would have sent.
A mini-batch of B examples of a group lies about their mean at a distance whose square
is the B-th part of their variance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lola_flwr.arrays import Float64Array, IntArray


@dataclass(frozen=True)
class Expected:
    """An update beside what examples let expect.

    Parameters
    ----------
    apart
        How far it is from the nearest group's mean, as a multiple of how far a
        mini-batch of that group is; infinite where no group has any noise.
    times_longest
        How many times as long it is as a mini-batch of the group with the longest.
    """

    apart: float
    times_longest: float


def expected(
    update: Mapping[int, Float64Array],
    examples: Mapping[int, Float64Array],
    groups: IntArray,
    batch_size: int,
) -> Expected | None:
    """Compare an update with groups of examples, and with all of them together.

    Parameters
    ----------
    update
        Projections of an update, shape [D], by part of the model.
    examples
        Projections of R examples' gradients, shape [R, D], by part.
    groups
        The number of each example's group, [R].
    batch_size
        Examples of the update's mini-batch.

    Returns
    -------
    None where examples tell nothing: the update is zero, or they are.
    """
    members = [groups == n for n in np.unique(groups)] + [np.full(len(groups), True)]
    apart, noise, lengths = np.zeros((3, len(members)))
    for part, projected in update.items():
        for n, some in enumerate(members):
            mean = examples[part][some].mean(axis=0)
            deviations = examples[part][some] - mean
            apart[n] += np.square(projected - mean).sum()
            noise[n] += np.square(deviations).sum(axis=1).mean() / batch_size
            lengths[n] += mean @ mean
    longest = float((lengths + noise).max())
    length = sum(float(projected @ projected) for projected in update.values())
    if not length or not longest:
        return None
    times = [a / n for a, n in zip(apart, noise, strict=True) if n]
    return Expected(
        math.sqrt(min(times, default=math.inf)), math.sqrt(length / longest)
    )
