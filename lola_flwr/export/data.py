"""A device's examples as files of arrays, and which of them a round's batch has.

A directory holds one file in NumPy's .npy format for each argument of the model, as
``input_ids.npy``; examples are its rows. The native device reads the same files, and
draws by the same rule.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lola_flwr.arrays import IntArray
from lola_flwr.errors import UserError
from lola_flwr.export.batches import ArrayBatch

_LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True, eq=False)
class ArrayFiles:
    """A device's examples, mapped from files: a source of mini-batches.

    Parameters
    ----------
    arrays
        Examples by the argument's name, as many in each.
    seed
        Seed by which batches are drawn.
    """

    arrays: ArrayBatch
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse a seed that the native device cannot have."""
        if not 0 <= self.seed <= _LARGEST_SEED:
            raise UserError(f"seed={self.seed} must be from 0 to {_LARGEST_SEED}.")

    @classmethod
    def in_directory(
        cls, directory: Path, names: Iterable[str], *, seed: int = 0
    ) -> ArrayFiles:
        """Map the files of a directory.

        Parameters
        ----------
        directory
            Where they are.
        names
            Names of the arguments.
        seed
            As of the class.

        Raises
        ------
        UserError
            A file is missing or is no array, or they have different examples.
        """
        arrays = {name: _mapped(directory / f"{name}.npy") for name in names}
        counts = {name: len(array) for name, array in arrays.items()}
        if len(set(counts.values())) != 1 or not min(counts.values()):
            raise UserError(
                f"The files in {directory} have different numbers of examples, or "
                f"none: {counts}; each row of each file is an example."
            )
        return cls(arrays=arrays, seed=seed)

    def __call__(self, server_round: int, batch_size: int) -> ArrayBatch:
        """Draw the mini-batch of a round; all examples, where there are fewer."""
        total = len(next(iter(self.arrays.values())))
        rows = chosen(total, batch_size, seed=self.seed, server_round=server_round)
        return {name: array[rows] for name, array in self.arrays.items()}


def chosen(
    num_examples: int, batch_size: int, *, seed: int, server_round: int
) -> IntArray:
    """Return the numbers of the examples that a round's mini-batch has.

    Each example has a number of 64 bits, which SplitMix64's finalizer makes of seed,
    round and example: ``mix(mix(mix(seed) ^ round) + example)``. The batch are those of
    the smallest, in rising order. No two are the same, since ``mix`` is one-to-one.

    Parameters
    ----------
    num_examples
        How many there are.
    batch_size
        How many are wanted.
    seed, server_round
        What the draw follows from.
    """
    key = _mix(_mix(np.array([seed], np.uint64)) ^ np.uint64(server_round))
    places = np.arange(num_examples, dtype=np.uint64)
    numbers = _mix(np.add(key, places, dtype=np.uint64))
    return numbers.argsort()[:batch_size]


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's step and finalizer (Steele, Lea, Flood, OOPSLA 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _mapped(path: Path) -> npt.NDArray[Any]:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); write one array for each argument of "
            "the model, with numpy.save."
        ) from None
    if not isinstance(array, np.ndarray) or not array.ndim:
        raise UserError(f"{path} holds no examples; its rows are to be examples.")
    return array
