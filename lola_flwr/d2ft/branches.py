"""The two residual branches of a layer, and what its sub-networks contribute to them.

A branch adds to its input the sum of what the sub-networks contribute. Each one's
contribution is computed from views of the layer's own weights, so that nothing is
copied. What comes before and after the sum, the normalisation, a bias, dropout, belongs
to the layer as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from lola_flwr.d2ft.operations import Operation
from lola_flwr.d2ft.subnetworks import (
    Branch,
    LayerParts,
    adapters_of,
    base_of,
)

# Part of a linear map: (input, run) -> output.
_Cut = Callable[[Tensor, int], Tensor]


def enter(
    parts: LayerParts, branch: Branch, row: Sequence[Operation], x: Tensor
) -> Tensor:
    """Return what a branch's sub-networks are given.

    Parameters
    ----------
    parts
        The layer.
    branch
        The branch.
    row
        Operation of each of the layer's G sub-networks, not all of them skipped.
    x
        Input of the branch, [B, S, H].
    """
    if not parts.norm_first:
        return x
    with torch.set_grad_enabled(Operation.FULL in row and torch.is_grad_enabled()):
        y: Tensor = parts.branch(branch).norm(x)
    return y


def contribute(
    parts: LayerParts,
    branch: Branch,
    row: Sequence[Operation],
    y: Tensor,
    attention_mask: Tensor | None,
) -> Tensor:
    """Sum up what those sub-networks contribute that run.

    Parameters
    ----------
    parts, branch, row
        As for `enter`.
    y
        What `enter` gave, [B, S, H].
    attention_mask
        As the layer itself receives it: boolean or additive, broadcastable to
        [B, heads, S, S].
    """
    runs = _runs(row)
    if branch == Branch.ATTENTION:
        compute = _attention(parts, runs, attention_mask)
    else:
        compute = _feed_forward(parts, runs)
    total: Tensor | None = None
    for number, run in enumerate(runs):
        if run.operation == Operation.SKIP:
            continue
        recorded = run.operation == Operation.FULL and torch.is_grad_enabled()
        with torch.set_grad_enabled(recorded):
            part = compute(y, number)
        total = part if total is None else total + part
    if total is None:
        raise AssertionError("a layer of which nothing runs is passed by")
    return total


def leave(
    parts: LayerParts,
    branch: Branch,
    row: Sequence[Operation],
    x: Tensor,
    total: Tensor,
) -> Tensor:
    """Return a branch's output.

    Parameters
    ----------
    parts, branch, row, x
        As for `enter`.
    total
        Sum of what the sub-networks contribute.
    """
    # Nothing in the layer is trained in this micro-batch unless some sub-network is.
    trained = Operation.FULL in row
    back, norm, dropout = parts.branch(branch)[1:]
    bias = base_of(back).bias
    if bias is not None:
        total = total + (bias if trained else bias.detach())
    x = x + dropout(total)
    if parts.norm_first:
        return x
    return norm(x) if trained else _normalised(norm, x)


class _Run(NamedTuple):
    """Neighbours of one operation, which run as one: first to last - 1."""

    operation: Operation
    first: int
    last: int


def _runs(row: Sequence[Operation]) -> list[_Run]:
    runs = []
    first = 0
    for operation, neighbours in groupby(row):
        last = first + len(list(neighbours))
        runs.append(_Run(operation, first, last))
        first = last
    return runs


def _attention(
    parts: LayerParts, runs: Sequence[_Run], attention_mask: Tensor | None
) -> _Cut:
    heads = [parts.heads(run.first, run.last)[1] for run in runs]
    widths = [count * parts.head_size for count in heads]
    inputs = [_outputs_cut(m, widths) for m in (parts.query, parts.key, parts.value)]
    project = _inputs_cut(parts.project, widths)
    rate = parts.attention_dropout if parts.layer.training else 0.0

    def attention(y: Tensor, run: int) -> Tensor:
        shape = (*y.shape[:2], heads[run], parts.head_size)
        query, key, value = (
            linear(y, run).view(shape).transpose(1, 2) for linear in inputs
        )  # [B, heads, S, head size]
        mixed = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, dropout_p=rate
        )
        return project(mixed.transpose(1, 2).flatten(2), run)

    return attention


def _feed_forward(parts: LayerParts, runs: Sequence[_Run]) -> _Cut:
    units = [parts.feed_forward(run.first, run.last)[1] for run in runs]
    up, down = _outputs_cut(parts.up, units), _inputs_cut(parts.down, units)

    def feed_forward(y: Tensor, run: int) -> Tensor:
        return down(parts.activation(up(y, run)), run)

    return feed_forward


def _normalised(norm: nn.Module, x: Tensor) -> Tensor:
    """Normalise without a gradient of the normalisation's own parameters."""
    if not isinstance(norm, nn.LayerNorm):
        return norm(x)  # type: ignore[no-any-return]
    weight, bias = (p if p is None else p.detach() for p in (norm.weight, norm.bias))
    return functional.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)


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
