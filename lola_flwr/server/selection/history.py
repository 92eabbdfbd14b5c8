"""What the server remembers about its blocks from round to round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lola_flwr.arrays import Float64Array, IntArray


@dataclass(frozen=True, eq=False)
class BlockHistory:
    """What became of each of the N blocks so far.

    Parameters
    ----------
    last_round
        Round of each block's last step, shape [N]; 0: none yet.
    relative_move
        Euclidean norm of each block's last step over that of its values, shape [N];
        infinite where it is not known.
    importance
        How much the loss suffers where a block's training is damped, on a scale of
        log-odds, shape [N]; 0: not known.
    blocks
        Which blocks of the model these N are, where they are not all of it.
    """

    last_round: IntArray
    relative_move: Float64Array
    importance: Float64Array
    blocks: tuple[int, ...] | None = None

    @classmethod
    def of(cls, num_blocks: int) -> BlockHistory:
        """Return the history of blocks that nobody has trained."""
        return cls(
            last_round=np.zeros(num_blocks, np.int64),
            relative_move=np.full(num_blocks, np.inf),
            importance=np.zeros(num_blocks),
        )

    @property
    def num_blocks(self) -> int:
        """Number of blocks N."""
        return self.last_round.size

    def only(self, blocks: Sequence[int]) -> BlockHistory:
        """Return the history of some blocks of the model, in this order."""
        rows = list(blocks)
        return BlockHistory(
            last_round=self.last_round[rows],
            relative_move=self.relative_move[rows],
            importance=self.importance[rows],
            blocks=tuple(rows),
        )

    def of_these(self, values: Sequence[float]) -> Float64Array:
        """Return what each of these N blocks has, of what each of the model's has."""
        return np.array(values)[list(self.blocks) if self.blocks else slice(None)]

    def staleness(self, server_round: int) -> IntArray:
        """Return the rounds from each block's last step to this round, shape [N]."""
        return server_round - self.last_round

    def after_round(
        self, server_round: int, relative_move: Mapping[int, float]
    ) -> BlockHistory:
        """Return the history after a round in which some blocks were stepped.

        Parameters
        ----------
        server_round
            Round, from 1.
        relative_move
            Relative move of each block that was stepped, by index; NaN if not measured.
        """
        last, move = self.last_round.copy(), self.relative_move.copy()
        for block, relative in relative_move.items():
            last[block] = server_round
            if not np.isnan(relative):
                move[block] = relative
        return replace(self, last_round=last, relative_move=move)
