"""Which components of a low-rank adapter a device sends, and what each then counts for.

A component of an adapter of rank R is a row of its A and the column of its B beside it.
A device that sends r of them draws component j with the probability ``p_j``, and what
comes of it counts ``1 / p_j`` times (Horvitz and Thompson, Journal of the American
Statistical Association 47, 1952): the expected sum is then that of all R, whatever the
probabilities. Components stand in places of their own, so the expected square of the
estimate is ``sum s_j / p_j`` where ``s_j`` is that of component j, however they are
drawn together. That is least where ``p_j`` is in proportion to the root of ``s_j``.
"""

from __future__ import annotations

import numpy as np

from lola_flwr.arrays import Float64Array, IntArray

# The least probability, in parts of what all would have if they were alike: nothing
# counts for more than R / r times 4, and no component is forgotten.
_LEAST = 0.25
# A square is at least so much of the mean one: what is near 0 is not known as well.
_SMALLEST = 1e-6
# From here on a probability is 1.
_CERTAIN = 1.0 - 1e-9


def inclusion_probabilities(square: Float64Array, rank: int) -> Float64Array:
    """Return with which probability each component is drawn, shape (R,).

    Parameters
    ----------
    square
        Expected square of each component's gradient, shape (R,); at least 0.
    rank
        How many are drawn, from 1 to R.

    Returns
    -------
    Those of the least expected square of the estimate, of all whose sum is ``rank`` and
    of which none is less than a quarter of ``rank / R``.

    Raises
    ------
    ValueError
        There are fewer components than are to be drawn.
    """
    if not 1 <= rank <= square.size:
        raise ValueError(f"{rank} of {square.size} components cannot be drawn.")
    if rank == square.size or not square.any():
        return np.full(square.size, rank / square.size)
    size = np.sqrt(np.maximum(square / square.mean(), _SMALLEST))
    least = _LEAST * rank / square.size
    # The sum rises with the root's scale, in lines between the scales at which one more
    # component is no longer at its least, or is at 1.
    scales = np.sort(np.concatenate([least / size, 1.0 / size]))
    sums = np.clip(scales[:, None] * size, least, 1.0).sum(axis=1)
    upper = min(int(np.searchsorted(sums, rank)), scales.size - 1)
    scale = np.interp(rank, sums[[upper - 1, upper]], scales[[upper - 1, upper]])
    return np.asarray(np.clip(scale * size, least, 1.0))


def drawn_components(probability: Float64Array, point: float) -> IntArray:
    """Draw as many components as the probabilities' sum, by one random number.

    Systematic sampling (Madow, Annals of Mathematical Statistics 20, 1949): the
    probabilities are laid end to end, and a comb with teeth 1 apart is put onto them.

    Parameters
    ----------
    probability
        Of each component, above 0 and at most 1, shape (R,); their sum is whole.
    point
        Where the comb begins: uniform in [0, 1).

    Returns
    -------
    The components, rising. Each is among them with its probability.
    """
    # A length of 1 would meet two teeth if it were too long by rounding.
    certain = probability >= _CERTAIN
    others = np.flatnonzero(~certain)
    if not others.size:
        return np.flatnonzero(certain)
    ends = np.cumsum(probability[others])
    count = round(float(ends[-1]))
    teeth = point + np.arange(count)
    places = np.searchsorted(ends * (count / ends[-1]), teeth, side="right")
    # The last tooth may be at the end by rounding.
    met = others[np.minimum(places, others.size - 1)]
    return np.sort(np.append(np.flatnonzero(certain), met))


def sampling_noise(square: Float64Array, probability: Float64Array) -> float:
    """Return the expected square of the estimate over that of all components; >= 1.

    Parameters
    ----------
    square, probability
        Of each component, shape (R,).
    """
    square = square if square.any() else np.ones_like(square)
    return float(max((square / probability).sum() / square.sum(), 1.0))
