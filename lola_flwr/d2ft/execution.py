"""Run a model's layers under a table of operations: what is skipped is not computed.

Each sub-network's contribution is computed from views of the layer's own weights, so
that nothing is copied: what runs fully is recorded for the backward pass, what runs
forward only is computed without recording anything, and what is skipped does not run. A
layer of which nothing runs is passed by as a whole.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
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

    runs = _runs(row)
    heads = [parts.heads(first, last)[1] for _, first, last in runs]
    units = [parts.feed_forward(first, last)[1] for _, first, last in runs]
    widths = [count * parts.head_size for count in heads]
    inputs = [_outputs_cut(m, widths) for m in (parts.query, parts.key, parts.value)]
    project = _inputs_cut(parts.project, widths)
    up, down = _outputs_cut(parts.up, units), _inputs_cut(parts.down, units)

    def attention(y: Tensor, run: int) -> Tensor:
        shape = (*y.shape[:2], heads[run], parts.head_size)
        query, key, value = (
            linear(y, run).view(shape).transpose(1, 2) for linear in inputs
        )  # [B, heads, S, head size]
        mixed = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attention_mask,
            dropout_p=parts.attention_dropout if training else 0.0,
        )
        return project(mixed.transpose(1, 2).flatten(2), run)

    def feed_forward(y: Tensor, run: int) -> Tensor:
        return down(parts.activation(up(y, run)), run)

    for branch, back, norm, dropout in (
        (attention, parts.project, parts.norm_1, parts.dropout_1),
        (feed_forward, parts.down, parts.norm_2, parts.dropout_2),
    ):
        if parts.norm_first:
            with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
                y = norm(x)
        else:
            y = x
        total = _contributions(branch, runs, y)
        bias = base_of(back).bias
        if bias is not None:
            total = total + (bias if trained else bias.detach())
        x = x + dropout(total)
        if not parts.norm_first:
            x = norm(x) if trained else _normalised(norm, x)
    return x


def _runs(row: Sequence[Operation]) -> list[tuple[Operation, int, int]]:
    """Return neighbours of one operation: what it is, the first, and one past the last.

    They run as one.
    """
    runs = []
    first = 0
    for operation, neighbours in groupby(row):
        last = first + len(list(neighbours))
        runs.append((operation, first, last))
        first = last
    return runs


def _contributions(
    branch: Callable[[Tensor, int], Tensor],
    runs: Sequence[tuple[Operation, int, int]],
    y: Tensor,
) -> Tensor:
    """Sum up what the sub-networks that run contribute."""
    total: Tensor | None = None
    for run, (operation, _, _) in enumerate(runs):
        if operation == Operation.SKIP:
            continue
        recorded = operation == Operation.FULL and torch.is_grad_enabled()
        with torch.set_grad_enabled(recorded):
            part = branch(y, run)
        total = part if total is None else total + part
    if total is None:
        raise AssertionError("a layer of which nothing runs is passed by")
    return total


def _normalised(norm: nn.Module, x: Tensor) -> Tensor:
    """Normalise without a gradient of the normalisation's own parameters."""
    if not isinstance(norm, nn.LayerNorm):
        return norm(x)  # type: ignore[no-any-return]
    weight, bias = (p if p is None else p.detach() for p in (norm.weight, norm.bias))
    return functional.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)


# Part of a linear map: (input, run) -> output.
_Cut = Callable[[Tensor, int], Tensor]


def _outputs_cut(linear: nn.Module, sizes: list[int]) -> _Cut:
    """Cut a linear map along its outputs; the bias is cut with them.

    Pieces are views. All at once: on the way back their gradients are put together in
    one go, where each view by itself would have one of the whole weight's size.
    """
    base = base_of(linear)
    weights = torch.split(base.weight, sizes)
    bias = base.bias
    biases = [None] * len(sizes) if bias is None else torch.split(bias, sizes)
    adapters = [
        (a.weight, torch.split(b.weight, sizes), scale, dropout)
        for a, b, scale, dropout in adapters_of(linear)
    ]

    def cut(x: Tensor, run: int) -> Tensor:
        result = functional.linear(x, weights[run], biases[run])
        for inner, outer, scale, dropout in adapters:
            low = functional.linear(dropout(x), inner)
            result = result + functional.linear(low, outer[run]) * scale
        return result

    return cut


def _inputs_cut(linear: nn.Module, sizes: list[int]) -> _Cut:
    """Cut a linear map along its inputs; the bias, common to all, is left out."""
    weights = torch.split(base_of(linear).weight, sizes, dim=1)
    adapters = [
        (torch.split(a.weight, sizes, dim=1), b.weight, scale, dropout)
        for a, b, scale, dropout in adapters_of(linear)
    ]

    def cut(x: Tensor, run: int) -> Tensor:
        result = functional.linear(x, weights[run])
        for inner, outer, scale, dropout in adapters:
            low = functional.linear(dropout(x), inner[run])
            result = result + functional.linear(low, outer) * scale
        return result

    return cut
