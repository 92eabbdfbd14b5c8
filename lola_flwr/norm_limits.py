"""How large an update of a block may be: a few times what was usual for that block."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median

# Accepted updates of a block that its usual norm is the median of. Norms change while a
# model learns: older ones say little. (On the demo's task with small batches no honest
# update of 40 rounds had 6.5 times its block's usual norm, 1 in 10 had 2.7 times.)
_WINDOW = 20
# Before a block has so many, no norm is unusual.
_FEWEST = 5


@dataclass(frozen=True)
class NormHistory:
    """Euclidean norms of the updates accepted lately.

    The norms are kept as they came, before clipping, so that the limit follows where
    honest gradients grow; and the median of a block's last norms is an honest one as
    long as more than half of them are.

    Parameters
    ----------
    of_block
        Norms by block index, oldest first.
    """

    of_block: Mapping[int, tuple[float, ...]] = field(default_factory=dict)

    def limit(self, block_index: int, factor: float) -> float:
        """Return the largest norm that an update of a block may have.

        Parameters
        ----------
        block_index
            The block.
        factor
            How many times the usual norm is still believed.

        Returns
        -------
        Infinite while too little is known of the block.
        """
        norms = self.of_block.get(block_index, ())
        return factor * median(norms) if len(norms) >= _FEWEST else math.inf

    def after(self, accepted: Iterable[tuple[int, float]]) -> NormHistory:
        """Return the history after one round's updates, as (block, norm) pairs."""
        norms = dict(self.of_block)
        for block_index, norm in accepted:
            norms[block_index] = (*norms.get(block_index, ()), norm)[-_WINDOW:]
        return NormHistory(norms)
