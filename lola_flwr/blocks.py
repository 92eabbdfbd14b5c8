"""Divide a transformer's parameters into the blocks that devices train.

A *block* is what one device trains in one round: the parameters of one layer of the
model's longest stack. Blocks are numbered from the input (index 0) to the output
(index N-1); ``depth`` counts the other way, from the loss: 1 is the last layer, N the
first. Parameters behind the stack are the *head*, which back-propagation passes on its
way to every block; the rest (embeddings) is *frozen*.

Everything follows from parameter names in model order, so that a server can divide a
state dict without building the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lola_flwr.errors import UserError

# A name inside a stack of layers: "<stack>.<layer>.<parameter of the layer>".
_STACKED = re.compile(r"(?P<stack>.+?)\.(?P<layer>\d+)\.(?P<parameter>.+)")

# Parameters that stand behind the stack in model order but feed every layer of it, as
# DeBERTa's relative positions do: their gradient needs the whole stack.
_SHARED_BY_LAYERS = re.compile(r"rel_embeddings|relative_attention_bias|rotary_emb")


class BlocksNotFound(UserError):
    """The model's parameters do not show one stack of equal layers."""


@dataclass(frozen=True)
class BlockPartition:
    """A model's parameter names, divided.

    Parameters
    ----------
    blocks
        Names of each block's parameters, from the input to the output.
    head
        Names of the parameters behind the last block; every device computes their
        gradient.
    frozen
        Names of the parameters that nobody trains.
    """

    blocks: tuple[tuple[str, ...], ...]
    head: tuple[str, ...]
    frozen: tuple[str, ...]

    @property
    def num_blocks(self) -> int:
        """Number of blocks N."""
        return len(self.blocks)

    @property
    def trainable(self) -> tuple[str, ...]:
        """Names of all blocks' parameters from the input on, then of the head."""
        return (*(name for block in self.blocks for name in block), *self.head)

    def merged(self) -> BlockPartition:
        """Return the partition whose only block is the whole stack.

        Training that block is ordinary fine-tuning of the model: every device
        back-propagates through everything and uploads everything.
        """
        stack = tuple(name for block in self.blocks for name in block)
        return BlockPartition(blocks=(stack,), head=self.head, frozen=self.frozen)

    def depth(self, block_index: int) -> int:
        """Layers that back-propagation passes to finish a block: 1 (last) to N."""
        return self.num_blocks - block_index

    def update_names(self, block_index: int) -> tuple[str, ...]:
        """Names of the gradients that a device with this block uploads, in order."""
        return (*self.blocks[block_index], *self.head)


def partition_parameters(
    names: Iterable[str], *, stack: str | None = None
) -> BlockPartition:
    """Divide parameter names into blocks, head and frozen rest.

    Parameters
    ----------
    names
        Parameter names in model order, as ``model.named_parameters()`` or a state dict
        gives them.
    stack
        Prefix of the stack of layers (``"roberta.encoder.layer"``) where the longest
        one is not meant.

    Returns
    -------
    BlockPartition
        Blocks in depth order.

    Raises
    ------
    BlocksNotFound
        No stack of at least two equal layers, several of the same length, or a given
        stack that does not exist.
    """
    names = tuple(names)
    stacks = _stacks_of(names)
    prefix = _longest_stack(stacks, names) if stack is None else stack
    if prefix not in stacks:
        known = ", ".join(sorted(stacks)) or "none"
        raise BlocksNotFound(
            f"No stack of layers at stack={stack!r}; the stacks found are: {known}."
        )
    layers = stacks[prefix]
    if sorted(layers) != list(range(len(layers))):
        raise BlocksNotFound(
            f"The layers of {prefix!r} are numbered {sorted(layers)}; expected 0 to "
            f"{len(layers) - 1} without gaps. Pass the names of the whole model."
        )
    blocks = tuple(tuple(layers[index]) for index in range(len(layers)))
    in_stack = {name for block in blocks for name in block}
    last = max(index for index, name in enumerate(names) if name in in_stack)
    behind = [name for name in names[last + 1 :] if name not in in_stack]
    # Where layers share relative positions, what stands beside the stack in the same
    # container (DeBERTa's encoder.LayerNorm) prepares these positions: not the head.
    container = prefix.rpartition(".")[0] + "."
    shared = [name for name in names if _SHARED_BY_LAYERS.search(name)]
    if any(name.startswith(container) and name not in in_stack for name in shared):
        behind = [name for name in behind if not name.startswith(container)]
    head = tuple(name for name in behind if name not in shared)
    blocks = tuple(
        tuple(name for name in block if name not in shared) for block in blocks
    )
    trained = {name for block in blocks for name in block}.union(head)
    frozen = tuple(name for name in names if name not in trained)
    return BlockPartition(blocks=blocks, head=head, frozen=frozen)


def _stacks_of(names: Sequence[str]) -> dict[str, dict[int, list[str]]]:
    """Collect the outermost numbered stacks: prefix -> layer index -> names."""
    stacks: dict[str, dict[int, list[str]]] = {}
    for name in names:
        # The lazy prefix of the pattern finds the outermost number of a name, so that
        # lists inside a layer stay inside it.
        match = _STACKED.fullmatch(name)
        if match:
            layers = stacks.setdefault(match["stack"], {})
            layers.setdefault(int(match["layer"]), []).append(name)
    return {
        prefix: layers
        for prefix, layers in stacks.items()
        if len(layers) >= 2 and _are_equal_layers(prefix, layers)
    }


def _are_equal_layers(prefix: str, layers: dict[int, list[str]]) -> bool:
    """Tell whether all layers hold parameters of the same names."""
    # T5's first layer alone holds the position bias of all layers: left out here.
    own_parameters = [
        {
            name.removeprefix(f"{prefix}.{index}.")
            for name in layer
            if not _SHARED_BY_LAYERS.search(name)
        }
        for index, layer in layers.items()
    ]
    return all(names == own_parameters[0] for names in own_parameters)


def _longest_stack(
    stacks: dict[str, dict[int, list[str]]], names: Sequence[str]
) -> str:
    """Choose the stack with most layers; refuse to guess between equals."""
    if not stacks:
        sample = ", ".join(names[:3]) or "no parameters at all"
        raise BlocksNotFound(
            "No stack of at least two equal layers among the parameter names "
            f"({sample}, ...). Name the stack with stack=..., or use a model whose "
            "layers have parameters of their own."
        )
    length = max(len(layers) for layers in stacks.values())
    longest = [prefix for prefix, layers in stacks.items() if len(layers) == length]
    if len(longest) > 1:
        raise BlocksNotFound(
            f"{len(longest)} stacks have {length} layers: {', '.join(longest)}. "
            "Choose one with stack=...."
        )
    return longest[0]
