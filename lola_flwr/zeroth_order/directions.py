"""Random directions that server and device draw alike, and what they carry.

Directions hold signs, not normal numbers: for those only the generator's raw bits are
needed, which NumPy promises to be the same everywhere. Their mean outer product is the
identity for both (Spall's SPSA).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lola_flwr.arrays import Float32Array
from lola_flwr.errors import UserError
from lola_flwr.randomness import rng_for
from lola_flwr.wire.records import Assignment

# With Flower's message around them, this many projections stay below 1 kB.
MAX_DIRECTIONS = 32

# Elements whose signs are drawn at once: no direction is ever held as a whole.
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Directions:
    """Directions that server and device draw alike.

    Parameters
    ----------
    seed
        Seed of the directions, for one device in one round.
    count
        How many.
    smallest_share
        Of each tensor, the share of the weights that move: those of the smallest
        magnitude. 1: all of them.
    perturbation
        How far to move along a direction, and against it (MeZO's epsilon); 0: nothing
        is moved, and the derivative itself is computed
        (`lola_flwr.zeroth_order.forward_mode`).
    """

    seed: int
    count: int
    smallest_share: float = 1.0
    perturbation: float = 1e-3

    def along(
        self, number: int, name: str, values: Float32Array
    ) -> Iterator[Float32Array]:
        """Draw one direction's part for one tensor, chunk by chunk of its elements.

        Parameters
        ----------
        number
            Number of the direction, from 0.
        name
            Name of the tensor.
        values
            Its values, which the mask follows from.
        """
        rng = rng_for(self.seed, "direction", number, name)
        flat = values.reshape(-1)
        limit = self._limit(flat)
        for start in range(0, flat.size, _CHUNK):
            part = flat[start : start + _CHUNK]
            bits = np.frombuffer(rng.bytes(-(-part.size // 8)), np.uint8)
            signs = np.unpackbits(bits, count=part.size).astype(np.float32) * 2 - 1
            yield signs if limit is None else signs * (abs(part) <= limit)

    def _limit(self, flat: Float32Array) -> float | None:
        """Return the largest magnitude that still moves; None where all do."""
        if self.smallest_share >= 1:
            return None
        kept = max(1, round(self.smallest_share * flat.size))
        return float(np.partition(abs(flat), kept - 1)[kept - 1])


def directions_of(assignment: Assignment) -> Directions:
    """Return the directions that an assignment asks for.

    Raises
    ------
    UserError
        It asks for none, or for nonsense.
    """
    seed, count = assignment.direction_seed, assignment.num_directions
    share, step = assignment.smallest_share, assignment.perturbation
    if seed is None or count is None or share is None or step is None:
        raise UserError("The assignment lacks a part of what makes directions.")
    if not (1 <= count <= MAX_DIRECTIONS and 0 < share <= 1 and step >= 0):
        raise UserError(
            f"num_directions={count}, smallest_share={share}, perturbation={step} is "
            "no assignment of directions."
        )
    return Directions(seed, count, share, step)


def estimated_gradient(
    values: Mapping[str, Float32Array],
    names: Sequence[str],
    *,
    directions: Directions,
    projections: Float32Array,
) -> dict[str, Float32Array]:
    """Put the estimate of a gradient together from its projections.

    Parameters
    ----------
    values
        The values that the projections were measured at, by name.
    names
        Parameters that were moved.
    directions
        The directions, as the device drew them.
    projections
        The gradient's projections on them, shape [count].

    Returns
    -------
    The mean over the directions of projection times direction, by name; without a mask
    its expectation is the gradient.
    """
    gradient = {}
    for name in names:
        total = np.zeros(values[name].size, np.float32)
        for number, projection in enumerate(projections / np.float32(projections.size)):
            start = 0
            for signs in directions.along(number, name, values[name]):
                total[start : start + signs.size] += projection * signs
                start += signs.size
        gradient[name] = total.reshape(values[name].shape)
    return gradient
