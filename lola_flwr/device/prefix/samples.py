"""What tells the samples of a call apart, and the weights that were computed with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import xxhash
from torch import Tensor

from lola_flwr.errors import UserError

Arguments = Mapping[int | str, Any]

WITHOUT_REUSE = "Train this model without prefix_cache= and without streaming."


def rows_of(value: Any, samples: Sequence[int], num_samples: int) -> Any:
    """Select the samples of an argument that holds one entry for each."""
    if isinstance(value, Tensor) and value.ndim and len(value) == num_samples:
        return value[list(samples)]
    return value


def padding_mask(batch: Arguments) -> Tensor | None:
    """Return which entries are no padding, if there is a mask with one per token."""
    mask = batch.get("attention_mask")
    return None if mask is None or mask.ndim != 2 else mask.bool().cpu()


def sample_keys(
    prefix: str, arguments: Arguments, num_samples: int, mask: Tensor | None
) -> list[list[str]]:
    """Return the keys of a call's samples, which do not depend on how far they reach.

    Padding is left out where it is one value, which counts instead.

    Returns
    -------
    For each sample its key; and for one without padding the key that it has with the
    padding of others in this call.

    Raises
    ------
    UserError
        Samples cannot be told apart by an argument.
    """
    common = hashlib.blake2b(prefix.encode(), digest_size=20)
    # By argument, what each sample has of it.
    parts: dict[int | str, list[Tensor]] = {}
    padding: dict[int | str, Tensor] = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            values = value.detach().cpu()
            per_sample = values.ndim > 0 and len(values) == num_samples
            parts[name] = [
                values[n] if per_sample else values for n in range(num_samples)
            ]
            if mask is not None and values.shape[:2] == mask.shape:
                different = torch.unique(values[~mask], dim=0)
                if len(different) <= 1:
                    padding[name] = different
                    parts[name] = [
                        row[kept] for row, kept in zip(values, mask, strict=True)
                    ]
        elif value is None or isinstance(value, bool | int | float | str):
            common.update(f"{name}={value!r}".encode())
        else:
            raise UserError(
                f"The model was called with {name}={type(value).__name__}, by which "
                f"samples cannot be told apart. {WITHOUT_REUSE}"
            )
    if mask is not None:
        # Where a sample stands among its padding.
        parts["positions"] = [row.nonzero() for row in mask]
    keys = [common.copy() for _ in range(num_samples)]
    for name, rows in parts.items():
        for key, row in zip(keys, rows, strict=True):
            _add(key, name, row)
    if mask is None or mask.all():
        return [[key.hexdigest()] for key in keys]
    padded = [key.copy() for key in keys]
    for name, value in padding.items():
        for key in padded:
            _add(key, name, value)
    return [
        [own.hexdigest(), other.hexdigest()] if whole else [other.hexdigest()]
        for own, other, whole in zip(keys, padded, mask.all(dim=1), strict=True)
    ]


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return a digest of named tensors; fast, for content that nobody forges."""
    total = xxhash.xxh3_128()
    for name, tensor in tensors:
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        total.update(_bytes(tensor.detach().cpu()))
    return total.hexdigest()


def _add(key: hashlib.blake2b, name: int | str, values: Tensor) -> None:
    key.update(f"{name} {tuple(values.shape)} {values.dtype}".encode())
    key.update(_bytes(values))


def _bytes(tensor: Tensor) -> memoryview:
    # Only a tensor with a dimension can be seen as bytes.
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
