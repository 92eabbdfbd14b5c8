"""How a device picks its mini-batches, by name and options; it needs no PyTorch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lola_flwr.errors import UserError, with_options

# What a history draws examples by.
Measure = Literal["variability", "loss"]

# Size of a pool, in mini-batches.
_POOL_FACTOR = 2


@dataclass(frozen=True, kw_only=True)
class Entropy:
    """Out of a pool, the examples that the model is least sure of.

    Source: the entropy-based data selection of FedFT-EDS, whose "hardened softmax" has
    a temperature below 1.

    Parameters
    ----------
    temperature
        The logits are divided by it: below 1 for sharper predictions.
    pool_factor
        Size of the pool, in mini-batches.

    Raises
    ------
    UserError
        The pool is no larger than the mini-batch, or the temperature not positive.
    """

    temperature: float = 1.0
    pool_factor: int = _POOL_FACTOR

    def __post_init__(self) -> None:
        if not (_is_number(self.temperature) and 0 < self.temperature < math.inf):
            raise UserError(f"temperature={self.temperature!r} must be above 0.")
        _check_pool(self.pool_factor)


@dataclass(frozen=True, kw_only=True)
class Coreset:
    """Out of a pool, the examples whose errors are most like those of all.

    Source: CRAIG, arXiv:1906.01827.

    Parameters
    ----------
    weighted
        Whether each weighs as many examples of the pool as it stands for.
    pool_factor
        Size of the pool, in mini-batches.

    Raises
    ------
    UserError
        The pool is no larger than the mini-batch, or an option is none.
    """

    weighted: bool = False
    pool_factor: int = _POOL_FACTOR

    def __post_init__(self) -> None:
        _check_bool("weighted", self.weighted)
        _check_pool(self.pool_factor)


@dataclass(frozen=True, kw_only=True)
class History:
    """Examples drawn by what training has shown of them so far.

    Source: the training dynamics that FTFT, arXiv:2310.06588, selects by, which are
    those of data maps, arXiv:2009.10795.

    Parameters
    ----------
    measure
        "variability": the standard deviation of the chance that the model gave the
        right class, by which ambiguous examples are drawn more often; "loss": the mean
        loss, by which hard ones are.
    uniform
        Share of the draws in which all examples are alike, above 0 and up to 1, so that
        none is forgotten and no weight exceeds its inverse.
    weighted
        Whether examples weigh the inverse of how much more often they are drawn: the
        gradient is then unbiased.

    Raises
    ------
    UserError
        An option is none.
    """

    measure: Measure = "variability"
    uniform: float = 0.2
    weighted: bool = False

    def __post_init__(self) -> None:
        if self.measure not in get_args(Measure):
            raise UserError(
                f"measure={self.measure!r} is unknown; choose from "
                f"{', '.join(get_args(Measure))}."
            )
        if not (_is_number(self.uniform) and 0 < self.uniform <= 1):
            raise UserError(f"uniform={self.uniform!r} must be above 0 and at most 1.")
        _check_bool("weighted", self.weighted)


Rule = Entropy | Coreset
_SAMPLERS: dict[str, type[Entropy | Coreset | History]] = {
    "entropy": Entropy,
    "coreset": Coreset,
    "history": History,
}


def sampler_named(name: str, options: Mapping[str, Any]) -> Rule | History | None:
    """Return a sampler; None for "random", which has no options.

    Raises
    ------
    UserError
        There is no such sampler, it has no such option, or a value is out of range.
    """
    if name == "random":
        if options:
            raise UserError(
                f'{dict(options)} mean nothing with sampler="random"; drop them, or '
                "choose a sampler."
            )
        return None
    if name not in _SAMPLERS:
        raise UserError(
            f"sampler={name!r} is unknown; choose from random, {', '.join(_SAMPLERS)}."
        )
    return with_options(_SAMPLERS[name], options, f"sampler={name!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise UserError(f"{name}={value!r} must be true or false.")


def _check_pool(pool_factor: object) -> None:
    whole = isinstance(pool_factor, int) and not isinstance(pool_factor, bool)
    if not whole or pool_factor < 2:  # type: ignore[operator]
        raise UserError(f"pool_factor={pool_factor!r} must be a whole number above 1.")
