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

from lola_flwr.arrays import Float64Array
from lola_flwr.server.own_examples import Groups


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
    update: Mapping[int, Float64Array], groups: Mapping[int, Groups], batch_size: int
) -> Expected | None:
    """Compare an update with groups of examples, and with all of them together.

    Parameters
    ----------
    update
        Projections of an update, shape [D], by part of the model.
    groups
        The examples' groups, by part.
    batch_size
        Examples of the update's mini-batch.

    Returns
    -------
    None where examples tell nothing: the update is zero, or they are.
    """
    length = sum(float(projected @ projected) for projected in update.values())
    if not length:
        return None
    of_parts = [(projected, groups[part]) for part, projected in update.items()]
    noise = np.sum([of.variances for _, of in of_parts], axis=0) / batch_size
    squares = np.sum([np.vecdot(of.means, of.means) for _, of in of_parts], axis=0)
    longest = float(np.max(squares + noise))
    if not longest:
        return None
    distances = [np.square(sent - of.means).sum(axis=1) for sent, of in of_parts]
    apart = np.sum(distances, axis=0)
    times = [a / n for a, n in zip(apart, noise, strict=True) if n]
    return Expected(
        math.sqrt(min(times, default=math.inf)), math.sqrt(length / longest)
    )
