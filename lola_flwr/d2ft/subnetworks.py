"""Cut a transformer's layers into sub-networks: head groups with their feed-forward.

A *sub-network* is a group of attention heads of a layer together with an equal part of
the layer's feed-forward network: rows of the query, key, value and up projections, and
the same columns of the two projections back. A layer's output is its input plus the sum
of what its sub-networks contribute, so that any of them can be left out. The biases of
the projections back and the normalisations belong to the layer as a whole.

Source: Ding, Zhang, Wang, Ateniese, Yuan, "D2FT: Distributed Dynamic Fine-Tuning for
Pretrained Transformers", arXiv:2504.12471, where a sub-network is one head of a layer
and a slice of its feed-forward part.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

from torch import Tensor, nn

from lola_flwr.errors import UserError
from lola_flwr.model.blocks import BlockPartition


class Branch(IntEnum):
    """One of the two residual branches that a layer consists of, in their order."""

    ATTENTION = 0
    FEED_FORWARD = 1


class LayerNotUnderstood(UserError):
    """A layer's parts are not where those of the known models are."""


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


@dataclass(frozen=True, eq=False)
class LayerParts:
    """One transformer layer, taken apart.

    Parameters
    ----------
    layer
        The layer itself.
    query, key, value, project, up, down
        Its linear maps, perhaps with a low-rank adapter (LoRA).
    activation
        Non-linearity of the feed-forward network.
    norm_1, norm_2
        Its normalisations: before attention and feed-forward part if ``norm_first``,
        otherwise after them.
    dropout_1, dropout_2
        What follows the two projections back.
    attention_dropout
        Rate of attention weights that training drops.
    num_heads, num_groups
        Heads of attention, and the groups that these are divided into.
    """

    layer: nn.Module
    query: nn.Module
    key: nn.Module
    value: nn.Module
    project: nn.Module
    up: nn.Module
    down: nn.Module
    activation: Callable[[Tensor], Tensor]
    norm_1: nn.Module
    norm_2: nn.Module
    norm_first: bool
    dropout_1: nn.Module
    dropout_2: nn.Module
    attention_dropout: float
    num_heads: int
    num_groups: int

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return out_features(self.query) // self.num_heads

    def heads(self, first: int, last: int) -> tuple[int, int]:
        """Return first head and number of heads of the groups first to last - 1."""
        start = first * self.num_heads // self.num_groups
        return start, last * self.num_heads // self.num_groups - start

    def branch(self, branch: Branch) -> BranchParts:
        """Return the parts of one of the layer's branches."""
        if branch == Branch.ATTENTION:
            maps = (self.query, self.key, self.value)
            return BranchParts(maps, self.project, self.norm_1, self.dropout_1)
        return BranchParts((self.up,), self.down, self.norm_2, self.dropout_2)

    def cut(self, branch: Branch, first: int, last: int) -> tuple[int, int]:
        """Return where a branch's maps are cut for the groups first to last - 1.

        Returns
        -------
        First feature inside the branch, and the number of them.
        """
        if branch == Branch.ATTENTION:
            head, count = self.heads(first, last)
            return head * self.head_size, count * self.head_size
        return self.feed_forward(first, last)

    def feed_forward(self, first: int, last: int) -> tuple[int, int]:
        """Return first unit and number of units of the groups first to last - 1."""
        width = out_features(self.up)
        start = first * width // self.num_groups
        return start, last * width // self.num_groups - start


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


def out_features(linear: nn.Module) -> int:
    """Return the width of a linear map's output, adapter or not."""
    return int(base_of(linear).weight.shape[0])


def hidden_size(subnetworks: Subnetworks) -> int:
    """Return the width of what passes from layer to layer."""
    return base_of(subnetworks.layers[0].query).in_features


def base_of(linear: Any) -> nn.Linear:
    """Return the linear map itself: the one beneath its adapter, if it has one."""
    base = getattr(linear, "base_layer", linear)
    if not isinstance(base, nn.Linear):
        raise LayerNotUnderstood(
            f"{type(base).__name__} stands where a Linear is expected: only plain "
            "linear maps can be cut into sub-networks."
        )
    return base


def adapters_of(linear: Any) -> list[tuple[nn.Linear, nn.Linear, float, Any]]:
    """Return a linear map's low-rank adapters: A, B, scale and dropout of each."""
    if not hasattr(linear, "lora_A"):
        if hasattr(linear, "base_layer"):
            raise LayerNotUnderstood(
                f"{type(linear).__name__} is an adapter that cannot be cut into head "
                "groups; use LoRA."
            )
        return []
    if getattr(linear, "lora_variant", None):
        raise LayerNotUnderstood(
            f"The adapter variants {sorted(linear.lora_variant)} cannot be cut into "
            "head groups; use plain LoRA."
        )
    return [
        (
            linear.lora_A[name],
            linear.lora_B[name],
            float(linear.scaling[name]),
            linear.lora_dropout[name],
        )
        for name in linear.active_adapters
        if name in linear.lora_A
    ]


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
        low-rank adapters that are not cut.
    """
    found: list[Slice] = []
    start, length = parts.cut(branch, first, last)

    def add(parameter: Tensor | None, dim: int) -> None:
        if parameter is not None:
            found.append(Slice(names[id(parameter)], dim, start, length))

    def add_whole(parameter: Tensor) -> None:
        if shared:
            found.append(Slice(names[id(parameter)], 0, 0, len(parameter)))

    into, back, *_ = parts.branch(branch)
    for linear in into:
        add(base_of(linear).weight, 0)
        add(base_of(linear).bias, 0)
        for a, b, _, _ in adapters_of(linear):
            add_whole(a.weight)
            add(b.weight, 0)
    add(base_of(back).weight, 1)
    for a, b, _, _ in adapters_of(back):
        add(a.weight, 1)
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
