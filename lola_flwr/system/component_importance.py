"""How large the gradients of an adapter's components were lately, by block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from lola_flwr.arrays import Float64Array

# What an update counts beside those before it.
_LATEST = 0.2


@dataclass(frozen=True)
class ComponentImportance:
    """Means of the squares of components' gradients, the latest counting most.

    Parameters
    ----------
    squares
        By block and component; of those that no device has sent there is none.
    """

    squares: Mapping[int, Mapping[int, float]] = field(default_factory=dict)

    def after(
        self, seen: Iterable[tuple[int, Mapping[int, float]]]
    ) -> ComponentImportance:
        """Take in what devices sent: block, and squares by component."""
        squares = {block: dict(known) for block, known in self.squares.items()}
        for block, latest in seen:
            known = squares.setdefault(block, {})
            for component, square in latest.items():
                before = known.get(component, square)
                known[component] = before + _LATEST * (square - before)
        return ComponentImportance(squares)

    def of_blocks(self, num_blocks: int, rank: int) -> Float64Array:
        """Return the square of each component, shape (N, R).

        One that is not known is taken to be as the mean of the others of its block, or
        where none is known, all alike: 1.
        """
        table = np.ones((num_blocks, rank))
        for block, known in self.squares.items():
            if block < num_blocks and known:
                table[block] = np.mean([*known.values()])
                table[block, [*known]] = [*known.values()]
        return table
