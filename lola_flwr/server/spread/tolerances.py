"""How far what honest devices compute may be from what the server computes.

Honest hardware differs by rounding, and, where dropout is drawn, by its generator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

_Array = npt.NDArray[Any]

# In lengths of what is compared: float32 and bfloat16 are apart by 0.03 at most, in the
# seven families of models of the tests.
TOLERANCE = 0.1
# The same of the move that a step makes, there by 0.04: Adam's first are the signs of
# gradients, and rounding turns those of the smallest round.
MOVE_TOLERANCE = 0.5
# In lengths of the shorter one: what a step of a model that can still be trained makes
# of contributions.
STEP_TOLERANCE = 10.0
# Where dropout is drawn: nothing honest is further apart than this, nor than twice as
# far as the server's own draws. What is turned round is nearly 2.
_DRAWS_TOLERANCE = 1.5
_DRAWS_APART = 2.0
# Draws of what is computed with other values than a model has may be apart by anything.
_FURTHEST_DRAWS = 2.0
# Sums over tokens may cancel out in one draw; they differ by no more than this factor.
_SUMS_APART = 10.0


def length(array: _Array) -> float:
    """Return an array's Euclidean length."""
    return float(np.linalg.norm(array.astype(np.float64)))


def distance(found: _Array, expected: _Array, small: float) -> float:
    """Return how far two arrays are apart, in lengths of the one that is expected.

    Parameters
    ----------
    found, expected
        The arrays, of one shape.
    small
        A distance that is none.
    """
    return _in_terms_of(length(found - expected) - small, length(expected))


def difference(one: _Array, other: _Array, small: float = 0.0) -> float:
    """Return how far two arrays are apart, in lengths of the shorter one.

    In those of one alone whatever is small would be near to what is long.
    """
    apart = length(one - other) - small
    return _in_terms_of(apart, min(length(one), length(other)))


def limit_of_draws(
    own: _Array, draws: Sequence[_Array], *, is_sum: bool = False
) -> float:
    """Return the largest `difference` of an honest device that draws otherwise.

    Parameters
    ----------
    own, draws
        What the server computes by the device's own seed, and by others.
    is_sum
        Whether it is a sum over tokens.
    """
    if is_sum:
        lengths = [length(array) for array in (own, *draws)]
        return _SUMS_APART * _in_terms_of(max(lengths), min(lengths))
    apart = max(difference(draw, own) for draw in draws)
    return max(_DRAWS_TOLERANCE, _DRAWS_APART * min(apart, _FURTHEST_DRAWS))


def _in_terms_of(apart: float, unit: float) -> float:
    if apart <= 0.0:
        return 0.0
    return apart / unit if unit else math.inf
