"""What PyTorch's operators take: operations, and memory that they give back at once."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from lola_flwr.errors import UserError

Formula = Callable[..., int]
aten = torch.ops.aten


def dense_parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """Return what holds a tensor's values: a sparse one's have places, too."""
    if tensor.layout is torch.strided:
        return (tensor,)
    if tensor.layout is torch.sparse_coo:
        return tensor._indices(), tensor._values()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    return ()  # in a layout of oneDNN's own, for the length of an operation


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """Give the tensors among arguments, those in lists too."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)


def workspace_of(func: Any, args: Sequence[Any], out: Any) -> tuple[int, ...]:
    """Return what an operation takes besides what it gives: convolutions, on CPUs.

    oneDNN brings their tensors into layouts of its own, in blocks of 16 channels. (As
    measured: which of them, it decides for each shape.)
    """
    if func is aten.convolution.default:
        inputs, weight, groups = args[0], args[1], args[8]
        large = inputs if inputs.shape[1] >= _BLOCK else out
        sizes: tuple[int, ...] = (large.nbytes, weight.nbytes)
    elif func is aten.convolution_backward.default:
        given, inputs, weight, groups = *args[:3], args[9]
        blocked = weight.nbytes
        if groups > 1 and args[10][1]:  # the gradient of the weights is wanted
            outputs, width = weight.shape[0] // groups, weight.shape[1]
            padded = groups * _padded(outputs) * _padded(width)
            blocked = weight.nbytes // (weight.shape[0] * width) * padded
        sizes = (given.nbytes, inputs.nbytes, blocked)
    else:
        return ()
    return () if math.prod(weight.shape[2:]) == 1 else sizes


_BLOCK = 16


def _padded(channels: int) -> int:
    return -(-channels // _BLOCK) * _BLOCK


# --- operations -----------------------------------------------------------------------


def count_flops(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any
) -> int:
    """Count the operations of the products that an operator takes.

    Sums, element by element, are none: they take little time beside them.

    Raises
    ------
    UserError
        Nothing is known of this operator.
    """
    packet = getattr(func, "overloadpacket", func)
    if packet not in _formulas:
        _formulas[packet] = _find_formula(func, packet)
    formula = _formulas[packet]
    if formula is None:
        return 0
    sparse = [t for t in tensors_in(args) if t.layout in _SPARSE]
    if sparse:
        return 2 * sparse[0]._nnz() * int(next(tensors_in([out])).shape[-1])
    return int(formula(*args, **kwargs, out_val=out))


_SPARSE = (torch.sparse_coo, torch.sparse_csr, torch.sparse_bsr)

_formulas: dict[Any, Formula | None] = {}

# Of operators that multiply; PyTorch has formulas for most.
_MULTIPLIES = re.compile(
    r"(?:^|_)(?:\w*mm|\w*mv|\w*dot|gemm?|gemv|conv\w*|rnn|lstm|gru|cdist|attention)"
    r"(?:_|\d|$)"
)
_COPIES = re.compile(r"quant")


def _find_formula(func: Any, packet: Any) -> Formula | None:
    if packet in flop_registry:
        formula: Formula = flop_registry[packet]
        return formula
    space, _, name = str(func.name()).partition("::")
    name = name.partition(".")[0]
    if space == "aten":
        if name in _OWN:
            return _OWN[name]
        if name.startswith("linalg_") and not name.endswith("norm"):
            return _of_decomposition
        if name.startswith("_sparse") and _MULTIPLIES.search(name):
            return _of_product
        if name.startswith("mkldnn_rnn"):
            raise UserError(
                "What a recurrent layer takes inside oneDNN is not known; set "
                "torch.backends.mkldnn.enabled = False, on the devices too, and it is "
                "counted as the products that it is."
            )
        known = not _MULTIPLIES.search(name)
    else:
        if space == "bitsandbytes" and _MULTIPLIES.search(name):
            return _of_product
        known = space in ("prim", "prims") or (
            space == "bitsandbytes" and _COPIES.search(name) is not None
        )
    if not known:
        raise UserError(
            f"How many operations {space}::{name} takes is not known; tell PyTorch, "
            f"with torch.utils.flop_counter.register_flop_formula(torch.ops.{space}."
            f"{name})."
        )
    return None


def _of_product(first: Tensor, *_: Any, out_val: Any, **__: Any) -> int:
    """Count a product whose sum runs over the last dimension of its first factor."""
    return 2 * next(tensors_in([out_val])).numel() * int(first.shape[-1])


def _of_attention(products: int) -> Formula:
    """Count products of [S, S] by [S, d] in each head, in CPUs' fused attention."""

    def formula(*args: Any, out_val: Any, **_: Any) -> int:
        # Backward, the output's gradient comes first.
        query, key = args[:2] if products == 2 else args[1:3]
        return int(2 * products * query.numel() * key.shape[-2])

    return formula


def _of_decomposition(*args: Any, out_val: Any, **_: Any) -> int:
    """Estimate what it takes to solve, invert or decompose matrices."""
    return max(t.numel() * t.shape[-1] for t in tensors_in(args) if t.ndim >= 2)


def _of_matrix_vector(*args: Any, out_val: Any, **_: Any) -> int:
    return 2 * max(t.numel() for t in tensors_in(args))


def _of_grouped_product(first: Tensor, *_: Any, out_val: Tensor, **__: Any) -> int:
    """Count products of parts of a tensor with a matrix for each part."""
    return 2 * first.numel() * out_val.shape[-1]


_OWN: dict[str, Formula] = {
    "_scaled_dot_product_flash_attention_for_cpu": _of_attention(2),
    # The products of the forward pass are taken again.
    "_scaled_dot_product_flash_attention_for_cpu_backward": _of_attention(5),
    "mv": _of_matrix_vector,
    "addmv": _of_matrix_vector,
    "dot": _of_matrix_vector,
    "vdot": _of_matrix_vector,
    "_grouped_mm": _of_grouped_product,
}
