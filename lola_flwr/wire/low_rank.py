"""Low-rank projection of gradients: less to upload, and less for the optimizer to hold.

Source: Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank
Projection", arXiv:2403.03507: the optimizer works on ``P^T G`` in place of a gradient
``G``, with a projection ``P`` that is renewed from time to time. GaLore takes it from a
singular value decomposition of the gradient; a server that is sent ``P^T G`` alone
knows no such thing, and would have to have ``P`` sent as well. Here it is random, drawn
by both sides from the same seed, as in Hao, Cao, Mou, "Flora: Low-Rank Adapters Are
Secretly Gradient Compressors", arXiv:2402.03293. So nothing but ``P^T G`` travels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lola_flwr.arrays import Float32Array
from lola_flwr.errors import UserError
from lola_flwr.randomness import rng_for
from lola_flwr.wire.records import Assignment


@dataclass(frozen=True)
class LowRankProjection:
    """Projections of matrices along their shorter side, renewed every so many rounds.

    Parameters
    ----------
    rank
        Rows of a projected matrix. A matrix whose shorter side is no longer, or an
        array that is no matrix, is left as it is.
    period
        Rounds for which a projection is kept (GaLore's T).
    seed
        Seed of the run.

    Raises
    ------
    UserError
        Rank or period is below 1.
    """

    rank: int
    period: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rank", "period"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1.")

    def assignment_fields(self) -> dict[str, Any]:
        """Return the fields of an assignment that ask for this projection."""
        return {
            "projection_rank": self.rank,
            "projection_period": self.period,
            "projection_seed": self.seed,
        }

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of an array's projection."""
        if len(shape) != 2 or min(shape) <= self.rank:
            return tuple(shape)
        return self.rank, max(shape)

    def basis_number(self, server_round: int) -> int:
        """Return which projection a round's is: rounds of one number share it."""
        return (server_round - 1) // self.period

    def project(
        self, server_round: int, name: str, gradient: Float32Array
    ) -> Float32Array:
        """Return ``P^T G``, shape [rank, longer side]."""
        if self.shape(gradient.shape) == gradient.shape:
            return gradient
        basis = self._basis(server_round, name, min(gradient.shape))
        upright = gradient if gradient.shape[0] <= gradient.shape[1] else gradient.T
        return np.ascontiguousarray(basis.T @ upright)

    def lift(
        self,
        server_round: int,
        name: str,
        projected: Float32Array,
        shape: Sequence[int],
    ) -> Float32Array:
        """Return ``P R``, of the shape of the parameter of this name.

        Parameters
        ----------
        server_round
            Round in which it was projected.
        name
            Name of the parameter.
        projected
            What to lift, of the projection's shape.
        shape
            Shape of the parameter.
        """
        if tuple(shape) == projected.shape:
            return projected
        lifted = self._basis(server_round, name, min(shape)) @ projected
        return np.ascontiguousarray(lifted if shape[0] <= shape[1] else lifted.T)

    def _basis(self, server_round: int, name: str, side: int) -> Float32Array:
        """Return orthonormal columns, shape [side, rank]."""
        number = self.basis_number(server_round)
        normal = rng_for(self.seed, "projection", number, name).standard_normal(
            (side, self.rank)
        )
        # The signs of a decomposition's columns are the library's own choice.
        columns, triangle = np.linalg.qr(normal)
        return np.asarray(columns * np.sign(np.diag(triangle)), dtype=np.float32)


def projection_of(assignment: Assignment) -> LowRankProjection | None:
    """Return the projection that an assignment asks for, if it does."""
    rank, period = assignment.projection_rank, assignment.projection_period
    if rank is None or period is None or assignment.projection_seed is None:
        return None
    return LowRankProjection(rank, period, assignment.projection_seed)
