"""Count what PyTorch does below autograd: operations, and the bytes alive at a time.

What runs may be real or fake (``FakeTensorMode``, which knows shapes and computes
nothing): the counter sees the same operations. What is fake runs with a batch of prime
size, of which no other size of the model is a multiple. A tensor whose number of
elements it divides therefore has that many for every example, and what was counted once
is known for any batch.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from lola_flwr.arrays import Float64Array
from lola_flwr.costs.operations import (
    count_flops,
    dense_parts,
    tensors_in,
    workspace_of,
)

BATCHES = (4099, 4111, 4127)

# Largest power of the batch that is told apart: losses that compare all examples of a
# batch with each other have squares.
_POWERS = 3

# Below this no random number is below a probability: LayerDrop drops no layer.
_NEARLY_ONE = 1 - 2**-24

Coefficients = npt.NDArray[np.int64] | npt.NDArray[np.float64]
aten = torch.ops.aten


def at_batch(coefficients: Coefficients, batch_size: float) -> Float64Array:
    """Return numbers at a batch size, from their coefficients ``[..., powers]``."""
    powers = np.array([float(batch_size) ** power for power in range(_POWERS)])
    return np.asarray(coefficients @ powers)


@dataclass(eq=False)
class Pass:
    """What was counted of one pass, forward and perhaps back.

    Parameters
    ----------
    flops
        Operations: coefficients of the powers of the batch size.
    changes
        Bytes that came (positive) or went, by event; coefficients as above, [E, 3].
    storages
        Number of the storage of each event, [E].
    starts
        Event at which each block's weights were first read.
    traces
        Digest of the operations from there to the next block's start.
    gradients
        Numbers of the storages of the gradients that the pass returned.
    """

    flops: Coefficients
    changes: Coefficients
    storages: npt.NDArray[np.int64]
    starts: Mapping[int, int]
    traces: Mapping[int, int]
    gradients: Collection[int] = ()

    def peak_bytes(
        self, batch_size: int, *, gradients: bool = True, before: int | None = None
    ) -> float:
        """Return the most bytes that were alive at a time.

        Parameters
        ----------
        batch_size
            Examples of a batch.
        gradients
            Whether those count that the pass returned.
        before
            Block up to whose start to look (default: to the end).
        """
        until = None if before is None else self.starts.get(before)
        changes = at_batch(self.changes[:until], batch_size)
        if not gradients:
            changes = changes[~np.isin(self.storages[:until], list(self.gradients))]
        return float(np.cumsum(changes).max(initial=0.0))


@dataclass(frozen=True, eq=False)
class TwoPasses:
    """Passes with two examples and with three, by which those with more are known.

    It has what a `Pass` has. (With one, PyTorch chooses other kernels.)
    """

    two: Pass
    three: Pass

    @property
    def flops(self) -> Coefficients:
        """Operations: coefficients of the powers of the batch size."""
        two, three = self.two.flops[0], self.three.flops[0]
        return np.array([3 * two - 2 * three, three - two, 0])

    @property
    def starts(self) -> Mapping[int, int]:
        """Event at which each block's weights were first read."""
        return self.two.starts

    @property
    def traces(self) -> Mapping[int, int]:
        """Digest of the operations from there to the next block's start."""
        return self.two.traces

    def peak_bytes(
        self, batch_size: int, *, gradients: bool = True, before: int | None = None
    ) -> float:
        """Return the most bytes that were alive at a time, as `Pass` does."""
        two, three = (
            done.peak_bytes(1, gradients=gradients, before=before)
            for done in (self.two, self.three)
        )
        return two + (batch_size - 2) * (three - two)


@dataclass(eq=False)
class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what runs inside its ``with``.

    Parameters
    ----------
    blocks
        The model's tensors: the block that each one's storage belongs to, or -1. They
        do not count as bytes that came.

    Attributes
    ----------
    tracing
        Whether the blocks' starts and operations are noted, as in the forward pass.
    """

    blocks: Mapping[int, int]
    batch: int = 0
    tracing: bool = True
    _flops: list[int] = field(default_factory=lambda: [0] * _POWERS)
    _changes: list[tuple[int, int, int]] = field(default_factory=list)
    _alive: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    _came: int = 0
    _starts: dict[int, int] = field(default_factory=dict)
    _traces: dict[int, int] = field(default_factory=dict)
    _block: int = -1

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            # Most of what fake tensors are asked; the answer is at hand.
            (asked,) = args
            if (
                isinstance(asked, FakeTensor)
                and not asked.fake_mode.in_kernel_invocation
            ):
                return asked.fake_device
            return func(*args, **kwargs)
        if func is aten.rand.default and not args[0]:
            return torch.tensor(_NEARLY_ONE)
        if func is aten._local_scalar_dense.default and self.batch and not self.tracing:
            return 0.0  # the loss, which has no value
        if self.tracing:
            self._trace(func, args)
        out = func(*args, **kwargs)
        power, count = self._split(count_flops(func, args, kwargs, out))
        self._flops[power] += count
        self.note(tensors_in([out]))
        self._work(workspace_of(func, args, out))
        return out

    def note(self, tensors: Iterable[Tensor]) -> set[int]:
        """Count tensors as alive from now on; return the numbers of their storages."""
        return {
            self._note(part.untyped_storage())
            for tensor in tensors
            for part in dense_parts(tensor)
        }

    def result(self, gradients: Iterable[Tensor] = ()) -> Pass:
        """Return what was counted; of gradients, that they are what was wanted."""
        events = np.array(self._changes, np.int64).reshape(-1, 3)
        changes = np.zeros((len(events), _POWERS), np.int64)
        changes[np.arange(len(events)), events[:, 1]] = events[:, 2]
        return Pass(
            flops=np.array(self._flops, np.int64),
            changes=changes,
            storages=events[:, 0],
            starts=self._starts,
            traces=self._traces,
            gradients=self.note(gradients),
        )

    def _note(self, storage: torch.UntypedStorage) -> int:
        key = storage._cdata
        if key in self.blocks:
            return -1
        if key not in self._alive:
            self._came += 1
            self._alive[key] = (self._came, *self._split(storage.nbytes()))
            self._changes.append(self._alive[key])
            weakref.finalize(storage, self._went, key)
        return self._alive[key][0]

    def _went(self, key: int) -> None:
        number, power, count = self._alive.pop(key)
        self._changes.append((number, power, -count))

    def _work(self, sizes: Iterable[int]) -> None:
        """Count bytes that come and go inside an operation."""
        for sign in (1, -1):
            for power, count in map(self._split, sizes):
                self._changes.append((0, power, sign * count))

    def _split(self, number: int) -> tuple[int, int]:
        """Split a number into a power of the batch and what is left."""
        power = 0
        while self.batch and power < _POWERS - 1 and number and not number % self.batch:
            number //= self.batch
            power += 1
        return power, number

    def _trace(self, func: Any, args: Sequence[Any]) -> None:
        tensors = list(tensors_in(args))
        for part in (part for tensor in tensors for part in dense_parts(tensor)):
            block = self.blocks.get(part.untyped_storage()._cdata, -1)
            if block >= 0 and block not in self._starts:
                self._starts[block] = len(self._changes)
                self._block = block
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
        before = self._traces.get(self._block, 0)
        self._traces[self._block] = hash((before, func, shapes))


def saved_bytes(model: nn.Module, run: Callable[[], Any]) -> int:
    """Count the bytes that autograd keeps for the backward pass, weights apart."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            # Holding the storage keeps its address from being given out again.
            storages[storage.data_ptr()] = storage
        # The tensor itself would make a cycle with its own graph, and never be freed.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in storages.values())
