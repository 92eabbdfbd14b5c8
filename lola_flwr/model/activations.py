"""Keep what back-propagation needs of the layers from a block on in 8 bits.

What PyTorch saves of these layers for the backward pass is stored in 8 bits, with the
least and a step for up to 128 features of a token, and brought back where the backward
pass needs it: activations as in SlimFit (arXiv:2305.18513), in groups as in GACT
(arXiv:2206.11357), since a few features of transformers are far larger than the others.
The forward pass is what it was, to the bit, and so is the loss; the gradient is near to
what it was.

Not quantised: weights, and what is computed from weights alone; masks, whole numbers;
what an operation gives beside its result, such as the means and deviations of
normalisation and the log-sums of attention; and rows of a few numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Any, Literal, get_args
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lola_flwr.errors import UserError
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.model.recompute import (
    recomputed_suffix,
    replaced_forward,
    suffix_modules,
)

Activations = Literal["exact", "int8"]

IN_PART = (
    "Layers that run in part, under a schedule, keep their activations as they are; "
    'set activations="exact", or reduced-schedules=false.'
)

# Rounds numbers from 0 to 255 to whole ones, in place.
Rounding = Callable[[Tensor], Tensor]

_LARGEST = 255
# Numbers of a row, and of a group of them: least and step take as much as two numbers.
_SHORTEST_ROW, _LONGEST_GROUP = 16, 128
# Arguments that are added to scores or decide about them; minus infinity has no step.
_MASKS = ("mask", "attn_mask", "attn_bias")


def kept_suffix(
    model: nn.Module,
    partition: BlockPartition,
    block_index: int,
    activations: Activations,
    recompute: bool,
) -> AbstractContextManager[None]:
    """Return the context in which the layers from a block on keep what is asked for.

    Layers that run twice keep what goes into them alone, and that as it is.

    Raises
    ------
    UserError
        There is no such way to keep activations.
    """
    if activations not in get_args(Activations):
        raise UserError(
            f"activations={activations!r} is unknown; choose from "
            f"{', '.join(get_args(Activations))}."
        )
    if recompute:
        return recomputed_suffix(model, partition, block_index)
    if activations == "int8":
        return quantised_suffix(model, partition, block_index)
    return nullcontext()


@contextmanager
def quantised_suffix(
    model: nn.Module,
    partition: BlockPartition,
    block_index: int,
    *,
    rounding: Rounding = torch.round_,
) -> Iterator[None]:
    """Keep what the layers from a block on save for backward in 8 bits, for a ``with``.

    Parameters
    ----------
    model
        The model.
    partition
        Its blocks.
    block_index
        The first block whose layers are meant.
    rounding
        How numbers become whole (default: to the nearest).
    """
    saving = _Saving(model, rounding)
    with ExitStack() as stack:
        for path in suffix_modules(model, partition, block_index):
            module = model.get_submodule(path)
            stack.enter_context(replaced_forward(module, saving.inside))
        yield


@dataclass(frozen=True, eq=False)
class _Rows:
    """Numbers in 8 bits in groups, in the order in which they lay in memory."""

    values: Tensor
    least: Tensor
    steps: Tensor


@dataclass(frozen=True)
class _Layout:
    """How a tensor lies in memory.

    Parameters
    ----------
    order
        Its axes from the outermost to the innermost.
    sizes, strides
        Of these axes; those that repeat one element have size 1.
    """

    order: tuple[int, ...]
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> _Layout:
        strides = tensor.stride()
        axes = range(tensor.dim())
        # The sort is stable: of axes with one stride the last stays the last.
        order = sorted(axes, key=lambda axis: (strides[axis] != 0, -strides[axis]))
        return cls(
            tuple(order),
            tuple(tensor.shape[axis] if strides[axis] else 1 for axis in order),
            tuple(strides[axis] for axis in order),
        )

    def rows_of(self, tensor: Tensor) -> Tensor:
        """Return the tensor in that order, what repeats one element once."""
        ordered = tensor.permute(self.order)
        for axis, size in enumerate(self.sizes):
            ordered = ordered.narrow(axis, 0, size)
        return ordered

    def as_shape(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """Undo it."""
        axes = [self.order.index(axis) for axis in range(len(self.order))]
        return rows.reshape(self.sizes).permute(axes).expand(shape)

    def merged(self) -> tuple[tuple[int, int], ...]:
        """Return sizes and strides that views of the same rows have in common."""
        merged: list[tuple[int, int]] = []
        *outer, last = zip(self.sizes, self.strides, strict=True)
        for size, stride in outer:
            if size == 1:
                continue
            if merged and merged[-1][1] == size * stride:
                merged[-1] = (merged[-1][0] * size, stride)
            else:
                merged.append((size, stride))
        return (*merged, last)


class _Saving(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Packs what is saved while layers run, and sees what of it is to stay as it is.

    Storages are held by weak references of PyTorch's own: for as long as one is there
    its number is given to no other.
    """

    def __init__(self, model: nn.Module, rounding: Rounding) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._rounding = rounding
        self._weights = _storages([*model.parameters(), *model.buffers()])
        self._exact: set[StorageWeakRef] = set()
        self._packed: WeakValueDictionary[Any, _Rows] = WeakValueDictionary()

    def inside(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return a layer's forward code with what it saves packed."""

        @wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self, saved_tensors_hooks(self._pack, _unpack):
                return forward(*args, **kwargs)

        return run

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        schema = func._schema
        names = (argument.name for argument in schema.arguments)
        for name, value in (*zip(names, args, strict=False), *kwargs.items()):
            if name in _MASKS:
                self._exact |= _storages(value)
        if len(schema.returns) > 1:
            self._exact |= _storages(result[1:])
        given = _storages((args, kwargs))
        if given and given <= self._weights:
            self._weights |= _storages(result)
        return result

    def _pack(self, tensor: Tensor) -> Any:
        if (
            tensor.layout is not torch.strided
            or not tensor.is_floating_point()
            or not tensor.numel()
            or tensor.dim() < 2
        ):
            return tensor
        storage, layout = _storage(tensor), _Layout.of(tensor)
        if (
            layout.sizes[-1] < _SHORTEST_ROW
            or storage in self._weights
            or storage in self._exact
        ):
            return tensor
        # Where it is the same memory it is packed once: what goes into the maps to
        # queries, keys and values.
        key = (
            storage,
            tensor.storage_offset(),
            tensor.dtype,
            tensor._version,
            layout.merged(),
        )
        rows = self._packed.get(key)
        if rows is None:
            rows = self._packed[key] = _quantised(
                layout.rows_of(tensor), self._rounding
            )
        return rows, layout, tensor.shape, tensor.dtype


def _storage(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def _storages(values: Any) -> set[StorageWeakRef]:
    """Return the storages of the tensors among values; sparse ones have none."""
    tensors = (v for v in tree_leaves(values) if isinstance(v, Tensor))
    return {_storage(t) for t in tensors if t.layout is torch.strided}


def _quantised(rows: Tensor, rounding: Rounding) -> _Rows:
    width = rows.shape[-1]
    groups = rows.reshape(*rows.shape[:-1], -1, _group_of(width)).float()
    least, most = torch.aminmax(groups, dim=-1, keepdim=True)
    steps = (most - least) / _LARGEST
    # Numbers that are all the same have a step of zero.
    values = (groups - least).div_(steps.clamp_min(torch.finfo(torch.float32).tiny))
    return _Rows(rounding(values).to(torch.uint8), least, steps)


def _group_of(width: int) -> int:
    """Return how many numbers of a row have a step of their own: an even part of it."""
    sizes = range(_LONGEST_GROUP, _SHORTEST_ROW - 1, -1)
    return next((size for size in sizes if width % size == 0), width)


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    rows, layout, shape, dtype = packed
    values = rows.values.to(torch.float32).mul_(rows.steps).add_(rows.least)
    result: Tensor = layout.as_shape(values.to(dtype), shape)
    return result
