"""Count operations and memory while something runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

T = TypeVar("T")


def counted_flops(run: Callable[..., T], *arguments: Any) -> tuple[T, int]:
    """Return what a function returns, and the operations of its matrix products."""
    # The formulas know matrix products, but not the CPU's fused attention.
    with _Flops() as counted, sdpa_kernel(SDPBackend.MATH):
        result = run(*arguments)
    return result, counted.total


def peak_bytes(model: nn.Module, run: Callable[..., object], *arguments: Any) -> int:
    """Return the most bytes of new tensors that a function has in use at once.

    ``model``'s own are not new, though the function makes views of them.
    """
    own = [*model.parameters(), *model.buffers()]
    with _Storages({tensor.untyped_storage()._cdata for tensor in own}) as storages:
        run(*arguments)
    peak: int = storages.peak
    return peak


class _Flops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up operations by PyTorch's own formulas.

    ``FlopCounterMode`` tells modules apart, too, which takes a fifth of a step's time.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total: int = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = kwargs or {}
        result = func(*args, **named)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **named, out_val=result)
        return result


class _Storages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the storages that operations make, until nothing refers to them."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak: int = 0
        self._now = 0
        self._known = known

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or not size:
            return
        self._known.add(key)
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size
