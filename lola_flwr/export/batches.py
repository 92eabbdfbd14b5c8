"""Mini-batches of any size as a program takes them: of one shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from lola_flwr.errors import UserError
from lola_flwr.export.manifest import BatchSpec, ExportManifest

IGNORED = -100
"""The label that the losses of transformers leave out of their mean."""

LABELS = "labels"

ArrayBatch = Mapping[str, npt.NDArray[Any]]


def num_examples(batch: ArrayBatch) -> int:
    """Return how many examples a batch has."""
    return len(next(iter(batch.values())))


def fitted(batch: ArrayBatch, manifest: ExportManifest) -> list[npt.NDArray[Any]]:
    """Fill a batch up to the shape that a program takes.

    Missing examples are the last one again, without a label, so that the mean loss is
    over the others; missing tokens are what the manifest says. Both only where that was
    seen to change neither loss nor gradient of this model.

    Parameters
    ----------
    batch
        Arguments of the model by name, as many examples in each.
    manifest
        What the program takes.

    Returns
    -------
    The arrays in the order of ``manifest.batch``.

    Raises
    ------
    UserError
        The batch is larger than the program's, is not of its arguments, or may not be
        filled up.
    """
    wanted = [spec.name for spec in manifest.batch]
    if set(batch) != set(wanted):
        raise UserError(
            f"A batch has {', '.join(sorted(batch))}, and the program takes "
            f"{', '.join(sorted(wanted))}; give it these, or export with such a batch."
        )
    given = num_examples(batch)
    if given < manifest.batch_size and not manifest.takes_fewer_examples:
        raise UserError(
            f"A batch has {given} examples, and the program takes "
            f"{manifest.batch_size}: this model's loss does not leave out what has no "
            "label; give whole batches."
        )
    return [_fitted(batch[s.name], s, given, manifest) for s in manifest.batch]


def _fitted(
    given: npt.NDArray[Any], spec: BatchSpec, num_given: int, manifest: ExportManifest
) -> npt.NDArray[Any]:
    too_large = any(
        have > room for have, room in zip(given.shape, spec.shape, strict=False)
    )
    other = [axis for axis, size in enumerate(spec.shape) if not _counts(axis, spec)]
    if (
        given.ndim != len(spec.shape)
        or too_large
        or len(given) != num_given
        or not num_given
        or any(given.shape[axis] != spec.shape[axis] for axis in other)
        or not np.can_cast(given.dtype, np.dtype(spec.dtype), "same_kind")
    ):
        raise UserError(
            f"{spec.name} of a batch is {given.dtype}{list(given.shape)}, and the "
            f"program takes {np.dtype(spec.dtype)}{list(spec.shape)} or less; draw "
            "such batches, or export for these."
        )
    if spec.fill is not None and given.shape[1] < spec.shape[1]:
        if not manifest.takes_fewer_tokens:
            raise UserError(
                f"Sequences of {given.shape[1]} tokens are shorter than the program's "
                f"{spec.shape[1]}, and padding changes what this model computes; give "
                f"sequences of {spec.shape[1]} tokens."
            )
        width = [(0, 0)] * given.ndim
        width[1] = (0, spec.shape[1] - given.shape[1])
        given = np.pad(given, width, constant_values=spec.fill)
    missing = spec.shape[0] - num_given
    again = np.repeat(given[-1:], missing, axis=0)
    if spec.name == LABELS:
        again = np.full_like(again, IGNORED)
    return np.ascontiguousarray(np.concatenate([given, again]), spec.dtype)


def _counts(axis: int, spec: BatchSpec) -> bool:
    """Tell whether an axis is of examples or tokens, of which there may be fewer."""
    return axis == 0 or (axis == 1 and spec.fill is not None)
