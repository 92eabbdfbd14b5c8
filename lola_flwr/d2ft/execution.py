"""Run a model's layers under a table of operations: what is skipped is not computed.

Each sub-network's contribution is computed from views of the layer's own weights, so
that nothing is copied: what runs fully is recorded for the backward pass, what runs
forward only is computed without recording anything, and what is skipped does not run. A
layer of which nothing runs is passed by as a whole.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import groupby
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lola_flwr.d2ft.operations import Operation
from lola_flwr.d2ft.subnetworks import (
    LayerParts,
    Subnetworks,
    adapters_of,
    base_of,
)
from lola_flwr.errors import UserError

# The operations of one micro-batch, [L][G].
OperationTable = Sequence[Sequence[Operation]]


class scheduled:
    """Let a model's layers follow a table of operations for the time of a ``with``.

    A layer whose sub-networks all run fully runs its own code.

    Parameters
    ----------
    subnetworks
        The model's sub-networks.
    operations
        What is done with each of them, [L][G].

    Raises
    ------
    UserError
        The table is of another shape.
    """

    def __init__(self, subnetworks: Subnetworks, operations: OperationTable) -> None:
        shape = {len(row) for row in operations}
        if len(operations) != subnetworks.num_layers or shape != {
            subnetworks.num_groups
        }:
            raise UserError(
                f"operations has {len(operations)} layers of {sorted(shape)} groups; "
                f"the model has {subnetworks.num_layers} of {subnetworks.num_groups}."
            )
        self._rows = [
            (parts, tuple(Operation(o) for o in row))
            for parts, row in zip(subnetworks.layers, operations, strict=True)
            if any(operation != Operation.FULL for operation in row)
        ]

    def __enter__(self) -> None:
        for parts, row in self._rows:
            # Modules call what they find under this name in themselves first.
            parts.layer.__dict__["forward"] = _Forward(parts, row)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for parts, _ in self._rows:
            del parts.layer.__dict__["forward"]


class _Forward:
    """Stands in for a layer's ``forward``."""

    def __init__(self, parts: LayerParts, row: tuple[Operation, ...]) -> None:
        self._parts, self._row = parts, row
        # transformers 4 expects layers to return tuples.
        returns = inspect.signature(type(parts.layer).forward).return_annotation
        self._in_tuple = "tuple" in str(returns).lower()

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *_: Any,
        **__: Any,
    ) -> Any:
        output = run_layer(self._parts, self._row, hidden_states, attention_mask)
        return (output,) if self._in_tuple else output


def run_layer(
    parts: LayerParts,
    row: Sequence[Operation],
    x: Tensor,
    attention_mask: Tensor | None,
) -> Tensor:
    """Return a layer's output under one operation per sub-network.

    Parameters
    ----------
    parts
        The layer.
    row
        Operation of each of its G sub-networks.
    x
        Input, [B, S, H].
    attention_mask
        As the layer itself receives it: boolean or additive, broadcastable to
        [B, heads, S, S].
    """
    if all(operation == Operation.SKIP for operation in row):
        return x
    # Nothing in the layer is trained in this micro-batch unless some sub-network is.
    trained = Operation.FULL in row
    training = parts.layer.training

    def attention(y: Tensor, first: int, last: int) -> Tensor:
        start, count = parts.heads(first, last)
        rows = start * parts.head_size, count * parts.head_size
        shape = (*y.shape[:2], count, parts.head_size)
        query, key, value = (
            _linear(linear, y, rows=rows).view(shape).transpose(1, 2)
            for linear in (parts.query, parts.key, parts.value)
        )  # [B, heads, S, head size]
        mixed = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attention_mask,
            dropout_p=parts.attention_dropout if training else 0.0,
        )
        return _linear(parts.project, mixed.transpose(1, 2).flatten(2), columns=rows)

    def feed_forward(y: Tensor, first: int, last: int) -> Tensor:
        units = parts.feed_forward(first, last)
        return _linear(
            parts.down,
            parts.activation(_linear(parts.up, y, rows=units)),
            columns=units,
        )

    for branch, back, norm, dropout in (
        (attention, parts.project, parts.norm_1, parts.dropout_1),
        (feed_forward, parts.down, parts.norm_2, parts.dropout_2),
    ):
        if parts.norm_first:
            with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
                y = norm(x)
        else:
            y = x
        total = _contributions(branch, row, y)
        bias = base_of(back).bias
        if bias is not None:
            total = total + (bias if trained else bias.detach())
        x = x + dropout(total)
        if not parts.norm_first:
            x = norm(x) if trained else _normalised(norm, x)
    return x


def _contributions(branch: Any, row: Sequence[Operation], y: Tensor) -> Tensor:
    """Sum up what the sub-networks that run contribute; neighbours run as one."""
    total: Tensor | None = None
    first = 0
    for operation, run in groupby(row):
        last = first + len(list(run))
        if operation != Operation.SKIP:
            recorded = operation == Operation.FULL and torch.is_grad_enabled()
            with torch.set_grad_enabled(recorded):
                part = branch(y, first, last)
            total = part if total is None else total + part
        first = last
    if total is None:
        raise AssertionError("a layer of which nothing runs is passed by")
    return total


def _normalised(norm: nn.Module, x: Tensor) -> Tensor:
    """Normalise without a gradient of the normalisation's own parameters."""
    if not isinstance(norm, nn.LayerNorm):
        return norm(x)  # type: ignore[no-any-return]
    weight, bias = (p if p is None else p.detach() for p in (norm.weight, norm.bias))
    return functional.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)


def _linear(
    linear: nn.Module,
    x: Tensor,
    *,
    rows: tuple[int, int] | None = None,
    columns: tuple[int, int] | None = None,
) -> Tensor:
    """Apply some rows (outputs) or some columns (inputs) of a linear map.

    The bias goes with the rows; of some columns it is left out.
    """
    base = base_of(linear)
    weight: Tensor = base.weight
    bias: Tensor | None = base.bias
    if rows is not None:
        weight = weight.narrow(0, *rows)
        bias = None if bias is None else bias.narrow(0, *rows)
    if columns is not None:
        weight, bias = weight.narrow(1, *columns), None
    result = functional.linear(x, weight, bias)
    for a, b, scale, dropout in adapters_of(linear):
        inner = a.weight if columns is None else a.weight.narrow(1, *columns)
        outer = b.weight if rows is None else b.weight.narrow(0, *rows)
        low = functional.linear(dropout(x), inner)
        result = result + functional.linear(low, outer) * scale
    return result
