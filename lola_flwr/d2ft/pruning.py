"""What of a base is pruned, by name and rate; it needs no PyTorch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lola_flwr.errors import UserError, with_options

Criterion = Literal["norm", "random"]

# Rates are decimal fractions: 0.3 of 10 are 3.
_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """What is left out of each layer of a base.

    Parameters
    ----------
    heads, neurons
        Which part of each layer's attention heads, and of the neurons of its
        feed-forward network; at least 0 and below 1. Where query heads share keys and
        values, heads of keys are counted, and the query heads go with them.
    criterion
        ``"norm"``: those go whose weights have the least norm. ``"random"``: those that
        are drawn by the run's seed.

    Raises
    ------
    UserError
        A rate or the criterion is none.
    """

    heads: float = 0.0
    neurons: float = 0.0
    criterion: Criterion = "norm"

    def __post_init__(self) -> None:
        for name in ("heads", "neurons"):
            rate = getattr(self, name)
            is_number = isinstance(rate, int | float) and not isinstance(rate, bool)
            if not is_number or not 0 <= rate < 1:
                raise UserError(
                    f"{name}={rate!r} must be a share of at least 0 and below 1."
                )
        if self.criterion not in get_args(Criterion):
            raise UserError(
                f"criterion={self.criterion!r} is unknown; choose from "
                f"{', '.join(get_args(Criterion))}."
            )

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Pruning | None:
        """Read the options of a run; None where nothing is pruned.

        Raises
        ------
        UserError
            One is unknown, or out of its range.
        """
        read = with_options(cls, options, "pruning")
        return read if read.heads or read.neurons else None


def num_pruned(count: int, rate: float) -> int:
    """Return how many of a number are pruned: no more than the rate, and not all."""
    return min(math.floor(rate * count + _ROUNDING), count - 1)
