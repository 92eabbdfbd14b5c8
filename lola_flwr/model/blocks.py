"""Divide a model's parameters into the blocks that devices train.

A *block* is what one device trains in one round: the parameters of one layer of the
model's longest stack, unless the blocks are given by hand. Blocks are numbered from the
input (index 0) to the output (index N-1); ``depth`` counts the other way, from the
loss: 1 is the last block, N the first. Parameters behind the last block are the *head*,
which back-propagation passes on its way to every block; the rest is *frozen*:
embeddings, what stands between blocks given by hand, and another stack behind the
blocks, which back-propagation passes but nobody trains (T5's decoder, where its
encoder is chosen).

Everything follows from parameter names in the order in which the modules run, so that a
server can divide a state dict without building the model. ``named_parameters()`` gives
the order in which modules were registered, which in most models is the same. Where it
is not (a classifier registered before the layers that feed it would count as frozen),
pass the names in running order, and the blocks by hand if their numbers mislead, too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from lola_flwr.errors import UserError

# A name inside a container of numbered modules: "<container>.<number>.<parameter>".
# The lazy prefix finds the outermost number, so that lists inside a layer stay inside.
_NUMBERED = re.compile(r"(.+?)\.\d+\..+")

# Parameters that stand behind the stack in model order but feed every layer of it, as
# DeBERTa's relative positions do: their gradient needs the whole stack.
_SHARED_BY_LAYERS = re.compile(r"rel_embeddings|relative_attention_bias")

# What a state dict holds beside parameters: statistics of batch normalization, and the
# frequencies of rotary positions.
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked", "inv_freq")

# The layers of a stack: number -> parameter within the layer -> its full name.
Layers = Mapping[int, Mapping[str, str]]


class BlocksNotFound(UserError):
    """The names do not show one stack of equal layers, or no such blocks."""


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
    layers
        Where blocks are adapters: names of the frozen weights of each block's layer.
    frozen_head
        Where blocks are adapters: names of the weights behind the last layer that
        back-propagation passes and nobody trains.
    """

    blocks: tuple[tuple[str, ...], ...]
    head: tuple[str, ...]
    frozen: tuple[str, ...]
    layers: tuple[tuple[str, ...], ...] = ()
    frozen_head: tuple[str, ...] = ()

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
        layers = (tuple(name for layer in self.layers for name in layer),)
        return replace(self, blocks=(stack,), layers=layers if self.layers else ())

    def freezing(self, names: Collection[str]) -> BlockPartition:
        """Return the partition in which these parameters, too, are frozen.

        A block of which nothing is left is none. If none is left, the head is the only
        block.

        Raises
        ------
        BlocksNotFound
            Nothing is left to train.
        """
        blocks = [tuple(n for n in block if n not in names) for block in self.blocks]
        blocks = [block for block in blocks if block]
        head = tuple(name for name in self.head if name not in names)
        if not (blocks or head):
            raise BlocksNotFound(
                "All parameters of blocks and head are frozen (requires_grad=False); "
                "let those want gradients that are to be trained."
            )
        return replace(
            self,
            blocks=tuple(blocks) or (head,),
            head=head if blocks else (),
            frozen=(*self.frozen, *(n for n in self.trainable if n in names)),
        )

    def depth(self, block_index: int) -> int:
        """Layers that back-propagation passes to finish a block: 1 (last) to N."""
        return self.num_blocks - block_index

    def update_names(self, block_index: int, *, head: bool = True) -> tuple[str, ...]:
        """Names of the gradients that a device with this block uploads, in order.

        Parameters
        ----------
        block_index
            The block.
        head
            Whether the device uploads the head's gradient, too.
        """
        return (*self.blocks[block_index], *(self.head if head else ()))


def partition_parameters(
    names: Iterable[str],
    *,
    stack: str | None = None,
    blocks: str | Sequence[str] | None = None,
) -> BlockPartition:
    r"""Divide parameter names into blocks, head and frozen rest.

    Without ``stack`` and ``blocks``, every layer of the longest stack of equal layers
    is a block.

    Parameters
    ----------
    names
        Parameter names in the order in which the modules run, as
        ``model.named_parameters()`` or a state dict mostly gives them. Leave out names
        of tied weights (a language model's ``lm_head``).
    stack
        Prefix of the stack whose layers are the blocks (``"encoder.block"``), where
        the longest is not meant or its layers are not equal: ``"swin.encoder.layers"``
        makes each stage of a Swin a block.
    blocks
        The blocks by hand, as regular expressions that match the beginning of names,
        up to a dot or the end. A sequence has one for each block, from the input to
        the output: ``["layer1", "layer2", "layer3", "layer4"]``. Of a single one, each
        different match is a block, in the order of the names:
        ``r"layer\d\.\d+"`` makes each residual block of a ResNet a block.

    Returns
    -------
    BlockPartition
        Blocks in depth order.

    Raises
    ------
    BlocksNotFound
        No stack of at least two equal layers, several of the same length or one behind
        the other, a stack or block that no name belongs to, or names that are not in
        model order.
    """
    names = tuple(names)
    parameters = [name for name in names if not name.endswith(_BUFFERS)]
    _refuse_alphabetical_order(parameters)
    if blocks is None:
        found = _blocks_of_stack(parameters, stack)
    elif stack is None:
        found = _blocks_by_hand(parameters, blocks)
    else:
        raise BlocksNotFound("Give stack=... or blocks=..., not both.")
    shared = {name for name in parameters if _SHARED_BY_LAYERS.search(name)}
    trained = tuple(
        tuple(name for name in block if name not in shared) for block in found
    )
    head = _head(parameters, {name for block in found for name in block}, shared)
    kept = {name for block in trained for name in block}.union(head)
    frozen = tuple(name for name in names if name not in kept)
    return BlockPartition(blocks=trained, head=head, frozen=frozen)


def passed_names(names: Iterable[str], partition: BlockPartition) -> tuple[str, ...]:
    """Return the names from the first block on: what back-propagation may pass.

    Parameters
    ----------
    names
        Names of all parameters, in the order in which the modules run.
    partition
        Their blocks.
    """
    names = tuple(names)
    in_blocks = {name for block in partition.blocks for name in block}
    first = min(index for index, name in enumerate(names) if name in in_blocks)
    return tuple(n for n in names[first:] if not _SHARED_BY_LAYERS.search(n))


def _refuse_alphabetical_order(names: Sequence[str]) -> None:
    """Refuse the order of safetensors files, in which a head may come first."""
    # Every module has its weight before its bias; the alphabet does not.
    if list(names) == sorted(names) and any(
        first.endswith(".bias") and second == f"{first.removesuffix('bias')}weight"
        for first, second in pairwise(names)
    ):
        raise BlocksNotFound(
            "The parameter names are in alphabetical order, as in a safetensors file; "
            "pass them in model order, as model.named_parameters() gives them."
        )


def _head(
    names: Sequence[str], in_blocks: set[str], shared: set[str]
) -> tuple[str, ...]:
    """Find the parameters behind the blocks that back-propagation passes first."""
    last = max(index for index, name in enumerate(names) if name in in_blocks)
    excluded = in_blocks | shared
    for layers in _containers(names).values():
        stack = {name for layer in layers.values() for name in layer.values()}
        if _are_modules(layers) and in_blocks.isdisjoint(stack):
            excluded |= stack
    # What stands beside shared relative positions (as DeBERTa's encoder.LayerNorm does)
    # prepares them for all layers.
    for container in {name.rsplit(".", 2)[0] for name in shared - in_blocks}:
        excluded |= {name for name in names if name.startswith(f"{container}.")}
    return tuple(name for name in names[last + 1 :] if name not in excluded)


def _blocks_by_hand(
    names: Sequence[str], blocks: str | Sequence[str]
) -> list[list[str]]:
    """Collect the names that match each block's regular expression."""
    found: dict[str, list[str]] = {}
    for pattern in [blocks] if isinstance(blocks, str) else blocks:
        try:
            # A prefix written with its dot, "layer.1.", does not mean "layer.10".
            prefix = pattern.removesuffix(".").removesuffix("\\")
            matches = [re.match(rf"(?:{prefix})(?=\.|$)", name) for name in names]
        except re.error as error:
            raise BlocksNotFound(
                f"blocks: {pattern!r} is not a regular expression: {error}."
            ) from None
        if not any(matches):
            raise BlocksNotFound(
                f"blocks: {pattern!r} matches the beginning of no parameter name "
                f"({_sample(names)}), up to a dot or the end."
            )
        for match in filter(None, matches):
            key = match[0] if isinstance(blocks, str) else pattern
            found.setdefault(key, []).append(match.string)
    if not found:
        raise BlocksNotFound("blocks is empty; give a regular expression per block.")
    counts = Counter(name for block in found.values() for name in block)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise BlocksNotFound(
            f"blocks: {twice[0]} belongs to more than one block; let every parameter "
            "match one regular expression."
        )
    return list(found.values())


def _blocks_of_stack(names: Sequence[str], stack: str | None) -> list[list[str]]:
    """Collect the names of each layer of a stack: a given one, or the longest."""
    containers = _containers(names)
    if stack is None:
        stack = _longest_stack(containers, names)
    layers = _layers_at(names, stack)
    if len(layers) < 2:
        known = ", ".join(filter(None, sorted(containers))) or "none"
        raise BlocksNotFound(
            f"No stack of layers at stack={stack!r}; the stacks found are: {known}."
        )
    if list(layers) != list(range(len(layers))):
        raise BlocksNotFound(
            f"The layers of {stack!r} are numbered {list(layers)}; expected 0 to "
            f"{len(layers) - 1} without gaps, in this order. Pass the names of the "
            "whole model in model order; or, if the modules between have no "
            f"parameters, blocks={_pattern_of(stack)}."
        )
    return [list(layer.values()) for layer in layers.values()]


def _containers(names: Sequence[str]) -> dict[str, Layers]:
    """Collect the outermost containers of at least two numbered modules."""
    # A model that is an nn.Sequential has numbers in front.
    top = _layers_at(names, "")
    if len(top) >= 2 and _are_equal(top):
        return {"": top}
    matches = [_NUMBERED.fullmatch(name) for name in names]
    prefixes = ["", *dict.fromkeys(match[1] for match in matches if match)]
    containers = {prefix: _layers_at(names, prefix) for prefix in prefixes}
    return {prefix: layers for prefix, layers in containers.items() if len(layers) >= 2}


def _layers_at(names: Sequence[str], prefix: str) -> Layers:
    """Collect the numbered modules under a prefix, in the order of the names."""
    pattern = re.compile(
        rf"{re.escape(f'{prefix}.' if prefix else '')}(?P<number>\d+)\.(?P<inner>.+)"
    )
    layers: dict[int, dict[str, str]] = {}
    for match in filter(None, map(pattern.fullmatch, names)):
        layers.setdefault(int(match["number"]), {})[match["inner"]] = match.string
    return layers


def _are_equal(layers: Layers) -> bool:
    """Tell whether all layers hold parameters of the same names."""
    # T5's first layer alone holds the position bias of all layers: left out here.
    own = [
        {inner for inner in layer if not _SHARED_BY_LAYERS.search(inner)}
        for layer in layers.values()
    ]
    return all(layer == own[0] for layer in own)


def _are_modules(layers: Layers) -> bool:
    """Tell a stack of layers from a head of plain modules (Linear, ReLU, Linear)."""
    return any("." in inner for layer in layers.values() for inner in layer)


def _longest_stack(containers: Mapping[str, Layers], names: Sequence[str]) -> str:
    """Choose the stack with most layers; refuse to guess between equals."""
    # Beside numbered modules, plain ones (Linear, ReLU, Linear) are a classifier.
    modules = {prefix: c for prefix, c in containers.items() if _are_modules(c)}
    candidates = modules or containers
    stacks = {prefix: c for prefix, c in candidates.items() if _are_equal(c)}
    if not stacks:
        unlike = " and ".join(map(repr, candidates))
        raise BlocksNotFound(
            "No stack of at least two equal layers among the parameter names "
            f"({_sample(names)})."
            + (f" The modules of {unlike} are unlike each other." if unlike else "")
            + " Name the stack with stack=..., or the blocks with blocks=[...]; layers "
            "that share their parameters, as ALBERT's do, cannot be told apart."
        )
    length = max(map(len, stacks.values()))
    longest = [prefix for prefix, layers in stacks.items() if len(layers) == length]
    if len(longest) > 1:
        raise BlocksNotFound(
            f"{len(longest)} stacks have {length} layers: {', '.join(longest)}. "
            "Choose one with stack=...."
        )
    order = list(candidates)
    behind = order[order.index(longest[0]) + 1 :]
    if modules and behind:
        raise BlocksNotFound(
            f"Behind the layers of {longest[0]!r} stand those of {behind[0]!r}. Choose "
            "one with stack=... (the other stays frozen), or name the blocks of both "
            "with blocks=[...]."
        )
    return longest[0]


def _pattern_of(stack: str) -> str:
    """Spell the regular expression whose matches are the modules of a stack."""
    return f'r"{re.escape(f"{stack}." if stack else "")}\\d+"'


def _sample(names: Sequence[str]) -> str:
    return f"{', '.join(names[:3])}, ..." if names else "no parameters at all"
