"""Who gave the latest updates of each block: no device is to give too many of them.

Who claims to be the fastest would else be asked for a block in every round, and nobody
could compare its updates with those of others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lola_flwr.arrays import IntArray
from lola_flwr.planning.candidates import WINDOW


@dataclass(frozen=True)
class Influence:
    """Who gave the latest updates of each block.

    Parameters
    ----------
    of_block
        Names of the devices by block index, oldest first.
    """

    of_block: Mapping[int, tuple[str, ...]] = field(default_factory=dict)

    def after(self, given: Iterable[tuple[int, str]]) -> Influence:
        """Take in a round's updates that were used: block and device."""
        of_block = dict(self.of_block)
        for block, device in given:
            of_block[block] = (*of_block.get(block, ()), device)[-WINDOW:]
        return Influence(of_block)

    def given(self, devices: Sequence[str], num_blocks: int) -> IntArray:
        """Return how many of each block's latest updates devices gave, [K, N]."""
        row = {name: n for n, name in enumerate(devices)}
        counts = np.zeros((len(devices), num_blocks), np.int64)
        for block, names in self.of_block.items():
            for name in names:
                if name in row:
                    counts[row[name], block] += 1
        return counts
