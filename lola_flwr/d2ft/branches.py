"""The two residual branches of a layer, and what its sub-networks contribute to them.

A branch adds to its input the sum of what the sub-networks contribute. Each one's
contribution is computed from views of the layer's own weights, so that nothing is
copied. What comes before and after the sum, the normalisation, a bias, dropout, belongs
to the layer as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain, groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from lola_flwr.d2ft.maps import adapters_of, base_of, in_features, outputs_dim
from lola_flwr.d2ft.operations import Operation
from lola_flwr.d2ft.subnetworks import Branch, LayerParts

# Part of a linear map: (input, run) -> output, or what the map's portions give.
_Cut = Callable[[Tensor, int], Tensor]
_CutInto = Callable[[Tensor, int], Sequence[Tensor]]


@dataclass(frozen=True, eq=False)
class Context:
    """What a layer is told beside hidden states: of which tokens it sees which.

    Parameters
    ----------
    attention_mask
        As the layer itself receives it: boolean or additive, broadcastable to
        [B, heads, S, S].
    positions
        Cosines and sines by which it turns queries and keys, if it does, broadcastable
        to [B, S, head size].
    """

    attention_mask: Tensor | None = None
    positions: tuple[Tensor, Tensor] | None = None


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
    context: Context,
) -> Tensor:
    """Sum up what those sub-networks contribute that run.

    Parameters
    ----------
    parts, branch, row
        As for `enter`.
    y
        What `enter` gave, [B, S, H].
    context
        What the layer is told of its tokens.
    """
    runs = _runs(row)
    if branch == Branch.ATTENTION:
        compute = _attention(parts, runs, context)
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


def _attention(parts: LayerParts, runs: Sequence[_Run], context: Context) -> _Cut:
    into, project = _cuts(parts, Branch.ATTENTION, runs)
    rate = parts.attention_dropout if parts.layer.training else 0.0
    mask = context.attention_mask
    shared = parts.num_key_heads < parts.num_heads
    kernel = sdpa_kernel if _hides_all(mask) else nullcontext

    def attention(y: Tensor, run: int) -> Tensor:
        query, key, value = (
            x.view(*y.shape[:2], -1, parts.head_size) for x in into(y, run)
        )
        query, key, value = (
            x.transpose(1, 2)
            for x in (parts.query_norm(query), parts.key_norm(key), value)
        )  # [B, heads, S, head size]
        if parts.rotate is not None and context.positions is not None:
            query, key = parts.rotate(query, key, *context.positions)
        with kernel(SDPBackend.MATH):
            mixed = functional.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                dropout_p=rate,
                is_causal=parts.is_causal and mask is None and y.shape[1] > 1,
                scale=parts.scale,
                enable_gqa=shared,
            )
        return project(mixed.transpose(1, 2).flatten(2), run)

    return attention


def _hides_all(mask: Tensor | None) -> bool:
    """Tell whether large numbers hide all tokens from one, as from padding in front.

    It then attends to all of them alike. PyTorch's fused kernels do not know that on
    the way back: they take each for the only one.
    """
    if mask is None or mask.dtype == torch.bool:
        return False
    return not bool((mask >= 0).any(-1).all())


def _feed_forward(parts: LayerParts, runs: Sequence[_Run]) -> _Cut:
    into, down = _cuts(parts, Branch.FEED_FORWARD, runs)

    def feed_forward(y: Tensor, run: int) -> Tensor:
        first, *gated = into(y, run)
        inner = parts.activation(first)
        for other in gated:
            inner = inner * other
        return down(parts.inner_dropout(inner), run)

    return feed_forward


def _cuts(
    parts: LayerParts, branch: Branch, runs: Sequence[_Run]
) -> tuple[_CutInto, _Cut]:
    """Cut a branch's maps for some runs: those into it, and the one back."""

    def sizes(width: int) -> list[int]:
        return [parts.cut(branch, width, run.first, run.last)[1] for run in runs]

    maps, back, *_ = parts.branch(branch)
    cuts = [
        _outputs_cut(linear, [sizes(width) for width in widths])
        for linear, widths in zip(maps, parts.portions(branch), strict=True)
    ]

    def into(x: Tensor, run: int) -> list[Tensor]:
        return [*chain.from_iterable(cut(x, run) for cut in cuts)]

    return into, _inputs_cut(back, sizes(in_features(back)))


def _normalised(norm: nn.Module, x: Tensor) -> Tensor:
    """Normalise without a gradient of the normalisation's own parameters."""
    own = {name: p.detach() for name, p in norm.named_parameters()}
    result: Tensor = functional_call(norm, own, (x,))
    return result


def _outputs_cut(linear: nn.Module, portions: Sequence[Sequence[int]]) -> _CutInto:
    """Cut a linear map along its outputs, each portion of them; the bias is cut, too.

    Pieces are views. All at once: on the way back their gradients are put together in
    one go, where each view by itself would have one of the whole weight's size.
    """
    base = base_of(linear)
    dim = outputs_dim(base)
    sizes = [*chain.from_iterable(portions)]
    weights = torch.split(base.weight, sizes, dim)
    bias = base.bias
    biases = [None] * len(sizes) if bias is None else torch.split(bias, sizes)
    adapters = [
        (a.weight, torch.split(b.weight, sizes), scale, dropout)
        for a, b, scale, dropout in adapters_of(linear)
    ]
    num_runs = len(portions[0])

    def cut(x: Tensor, run: int) -> list[Tensor]:
        pieces = range(run, len(sizes), num_runs)  # of each portion the run's
        results = [_linear(x, weights[piece], dim, biases[piece]) for piece in pieces]
        for inner, outer, scale, dropout in adapters:
            low = functional.linear(dropout(x), inner)
            for place, piece in enumerate(pieces):
                added = functional.linear(low, outer[piece]) * scale
                results[place] = results[place] + added
        return results

    return cut


def _inputs_cut(linear: nn.Module, sizes: list[int]) -> _Cut:
    """Cut a linear map along its inputs; the bias, common to all, is left out."""
    base = base_of(linear)
    dim = outputs_dim(base)
    weights = torch.split(base.weight, sizes, 1 - dim)
    adapters = [
        (torch.split(a.weight, sizes, dim=1), b.weight, scale, dropout)
        for a, b, scale, dropout in adapters_of(linear)
    ]

    def cut(x: Tensor, run: int) -> Tensor:
        result = _linear(x, weights[run], dim)
        for inner, outer, scale, dropout in adapters:
            low = functional.linear(dropout(x), inner[run])
            result = result + functional.linear(low, outer) * scale
        return result

    return cut


def _linear(
    x: Tensor, weight: Tensor, outputs_dim: int, bias: Tensor | None = None
) -> Tensor:
    return functional.linear(x, weight.t() if outputs_dim else weight, bias)
