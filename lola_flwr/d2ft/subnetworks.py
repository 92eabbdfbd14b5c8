"""Cut a transformer's layers into sub-networks: head groups with their feed-forward.

A *sub-network* is a group of attention heads of a layer together with an equal part of
the layer's feed-forward network: rows of the query, key, value and up projections, and
the same columns of the two projections back. A layer's output is its input plus the sum
of what its sub-networks contribute, so that any of them can be left out. The biases of
the projections back and the normalisations belong to the layer as a whole.

Where query heads share keys and values (grouped-query attention) a group holds whole
key/value heads, with all query heads that share them.

Source: Ding, Zhang, Wang, Ateniese, Yuan, "D2FT: Distributed Dynamic Fine-Tuning for
Pretrained Transformers", arXiv:2504.12471, where a sub-network is one head of a layer
and a slice of its feed-forward part.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from itertools import accumulate
from typing import NamedTuple

from torch import Tensor, nn

from lola_flwr.d2ft.maps import LayerNotUnderstood as LayerNotUnderstood
from lola_flwr.d2ft.maps import (
    adapters_of,
    base_of,
    in_features,
    out_features,
    outputs_dim,
)
from lola_flwr.model.blocks import BlockPartition


class Branch(IntEnum):
    """One of the two residual branches that a layer consists of, in their order."""

    ATTENTION = 0
    FEED_FORWARD = 1


@dataclass(frozen=True)
class Slice:
    """Part of a parameter: ``length`` entries from ``start`` on along one dimension."""

    name: str
    dim: int
    start: int
    length: int

    def of(self, tensor: Tensor) -> Tensor:
        """Return this part of the parameter, or of its gradient, as a view."""
        return tensor.narrow(self.dim, self.start, self.length)


class BranchParts(NamedTuple):
    """One residual branch of a layer.

    Parameters
    ----------
    into
        Linear maps whose outputs are cut into sub-networks.
    back
        The one whose inputs are.
    norm, dropout
        Normalisation, and what follows the projection back.
    """

    into: tuple[nn.Module, ...]
    back: nn.Module
    norm: nn.Module
    dropout: nn.Module


# Turns queries and keys by their positions: query, key, cosines, sines -> both turned.
Rotate = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerParts:
    """One transformer layer, taken apart.

    Parameters
    ----------
    layer
        The layer itself.
    inputs
        Its query, key and value projections, or one for all three.
    project, down
        Its projections back.
    query_norm, key_norm
        Normalisations of each head's queries and keys, common to all heads.
    ups
        The map up of its feed-forward network; or two, or one for both, of which the
        first is activated and gates the second. All of these linear maps perhaps with
        a low-rank adapter (LoRA).
    activation
        Non-linearity of the feed-forward network.
    norm_1, norm_2
        Its normalisations: before attention and feed-forward part if ``norm_first``,
        otherwise after them.
    dropout_1, dropout_2
        What follows the two projections back.
    inner_dropout
        What is before the map down.
    attention_dropout
        Rate of attention weights that training drops.
    head_size
        Width of one attention head.
    scale
        What attention multiplies products of queries and keys by (None: the inverse
        root of the head's width).
    is_causal
        Whether tokens see those before them only, where no mask says what they see.
    rotate
        Turns queries and keys by their positions.
    num_groups
        The groups that the heads are divided into.
    """

    layer: nn.Module
    inputs: tuple[nn.Module, ...]
    project: nn.Module
    query_norm: nn.Module
    key_norm: nn.Module
    ups: tuple[nn.Module, ...]
    down: nn.Module
    activation: Callable[[Tensor], Tensor]
    norm_1: nn.Module
    norm_2: nn.Module
    norm_first: bool
    dropout_1: nn.Module
    dropout_2: nn.Module
    inner_dropout: nn.Module
    attention_dropout: float
    head_size: int
    scale: float | None
    is_causal: bool
    rotate: Rotate | None
    num_groups: int

    @property
    def num_heads(self) -> int:
        """Heads of queries."""
        return in_features(self.project) // self.head_size

    @property
    def num_key_heads(self) -> int:
        """Heads of keys and values: as many, or fewer that query heads share."""
        outputs = sum(map(out_features, self.inputs))
        return (outputs - in_features(self.project)) // (2 * self.head_size)

    @property
    def sees_positions(self) -> bool:
        """Whether more tells its tokens apart than which of them there are."""
        return self.is_causal or self.rotate is not None

    def branch(self, branch: Branch) -> BranchParts:
        """Return the parts of one of the layer's branches."""
        if branch == Branch.ATTENTION:
            return BranchParts(self.inputs, self.project, self.norm_1, self.dropout_1)
        return BranchParts(self.ups, self.down, self.norm_2, self.dropout_2)

    def portions(self, branch: Branch) -> list[list[int]]:
        """Return the widths of what each of a branch's maps into it gives.

        Of one map for query, key and value these are three, of one that gates itself
        two, otherwise one. Each is cut into groups by itself.
        """
        into, back, *_ = self.branch(branch)
        widths = [out_features(linear) for linear in into]
        inner = in_features(back)
        if branch == Branch.FEED_FORWARD:
            return [[inner] * (width // inner) for width in widths]
        if len(into) > 1:
            return [[width] for width in widths]
        keys = self.num_key_heads * self.head_size
        return [[inner, keys, keys]]

    def cut(self, branch: Branch, width: int, first: int, last: int) -> tuple[int, int]:
        """Return where features are cut for the groups first to last - 1.

        Parameters
        ----------
        branch
            The branch.
        width
            Features of a portion of a map into it, or of the input of the one back.
        first, last
            The groups.

        Returns
        -------
        First feature, and the number of them.
        """
        pieces = self.num_key_heads
        if branch == Branch.FEED_FORWARD:
            pieces = in_features(self.down)
        start, end = (group * pieces // self.num_groups for group in (first, last))
        size = width // pieces
        return start * size, (end - start) * size


@dataclass(frozen=True, eq=False)
class Subnetworks:
    """A model's sub-networks, numbered layer by layer from the input on.

    Parameters
    ----------
    layers
        The layers, from the input to the output.
    slices
        What of which parameter belongs to each sub-network, by number: frozen
        parameters as well as trained ones.
    """

    layers: tuple[LayerParts, ...]
    slices: tuple[tuple[Slice, ...], ...]

    @property
    def num_layers(self) -> int:
        """Number of layers L."""
        return len(self.layers)

    @property
    def num_groups(self) -> int:
        """Head groups of a layer G."""
        return self.layers[0].num_groups

    @property
    def count(self) -> int:
        """Number of sub-networks S = L * G."""
        return len(self.slices)


def hidden_size(subnetworks: Subnetworks) -> int:
    """Return the width of what passes from layer to layer."""
    return in_features(subnetworks.layers[0].inputs[0])


def layer_names(partition: BlockPartition) -> list[str]:
    """Return the module that each block is, or is in: what ends in its number."""
    found: list[str] = []
    for block in partition.blocks:
        layers = {m[1] if (m := re.match(r"(.+?\.\d+)\.", n)) else n for n in block}
        if len(layers) != 1:
            raise LayerNotUnderstood(
                f"A block holds {' and '.join(sorted(layers)[:2])}; sub-networks are "
                "cut out of blocks of one layer each."
            )
        found += layers
    return found


def branch_slices(
    parts: LayerParts,
    branch: Branch,
    first: int,
    last: int,
    names: Mapping[int, str],
    *,
    shared: bool = False,
) -> list[Slice]:
    """Return what of which parameters belongs to some groups of one branch.

    Parameters
    ----------
    parts
        The layer.
    branch
        The branch.
    first, last
        The groups first to last - 1.
    names
        Name of each parameter, by ``id``.
    shared
        Whether to add what they need but share with other groups: the halves of
        low-rank adapters that are not cut, and normalisations of single heads.
    """
    found: list[Slice] = []

    def add(parameter: Tensor | None, dim: int, start: int, length: int) -> None:
        if parameter is not None:
            found.append(Slice(names[id(parameter)], dim, start, length))

    def add_whole(parameter: Tensor) -> None:
        if shared:
            found.append(Slice(names[id(parameter)], 0, 0, len(parameter)))

    into, back, *_ = parts.branch(branch)
    for linear, widths in zip(into, parts.portions(branch), strict=True):
        base = base_of(linear)
        offsets = accumulate(widths, initial=0)
        cuts = [
            (offset + start, length)
            for offset, width in zip(offsets, widths, strict=False)
            for start, length in [parts.cut(branch, width, first, last)]
        ]
        for cut in cuts:
            add(base.weight, outputs_dim(base), *cut)
        for cut in cuts:
            add(base.bias, 0, *cut)
        for a, b, _, _ in adapters_of(linear):
            add_whole(a.weight)
            for cut in cuts:
                add(b.weight, 0, *cut)
    if branch == Branch.ATTENTION:
        for norm in (parts.query_norm, parts.key_norm):
            for parameter in norm.parameters():
                add_whole(parameter)
    base = base_of(back)
    cut = parts.cut(branch, in_features(back), first, last)
    add(base.weight, 1 - outputs_dim(base), *cut)
    for a, b, _, _ in adapters_of(back):
        add(a.weight, 1, *cut)
        add_whole(b.weight)
    return found


def parameter_slices(
    subnetworks: Subnetworks, tensors: dict[str, Tensor]
) -> list[list[Tensor]]:
    """Return each sub-network's parts of some tensors, as views.

    Parameters
    ----------
    subnetworks
        The sub-networks.
    tensors
        Parameters or their gradients, by name; those that are missing have no part.
    """
    return [
        [part.of(tensors[part.name]) for part in parts if part.name in tensors]
        for parts in subnetworks.slices
    ]
