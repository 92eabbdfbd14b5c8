"""Divide a model's parameters into the blocks that devices train.

A *block* is what one device trains in one round: the parameters of one layer of the
model's longest stack, unless the blocks are given by hand. Blocks are numbered from the
input (index 0) to the output (index N-1); ``depth`` counts the other way, from the
loss: 1 is the last block, N the first. Parameters behind the last block are the *head*,
which back-propagation passes on its way to every block; the rest is *frozen*:
embeddings, what stands between blocks given by hand, and another stack behind the
blocks, which back-propagation passes but nobody trains (T5's decoder, where its
encoder is chosen).

``model_partition`` divides a model; what runs before and behind the blocks it sees in a
traced forward pass. ``partition_parameters`` divides names alone, as those of a state
dict: they have to be in the order in which the modules run. ``named_parameters()`` has
them in the order in which modules were registered, which is another one in some models:
XLM-RoBERTa has its classifier in front of the layers that feed it, BART a norm of its
embeddings behind the layers that it feeds.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from lola_flwr.model.stacks import (
    SHARED_BY_LAYERS,
    Behind,
    are_modules,
    blocks_of_stack,
    containers_of,
    names_of,
    sample_of,
)
from lola_flwr.model.stacks import BlocksNotFound as BlocksNotFound

# What a state dict holds beside parameters: statistics of batch normalization, and the
# frequencies of rotary positions.
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked", "inv_freq")


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

    def update_names(self, *blocks: int, head: bool = True) -> tuple[str, ...]:
        """Names of the gradients that a device with these blocks uploads, in order.

        Parameters
        ----------
        blocks
            The block, or the blocks.
        head
            Whether the device uploads the head's gradient, too.
        """
        names = tuple(name for block in blocks for name in self.blocks[block])
        return (*names, *(self.head if head else ()))


def partition_parameters(
    names: Iterable[str],
    *,
    stack: str | None = None,
    blocks: str | Sequence[str] | None = None,
    behind: Behind | None = None,
) -> BlockPartition:
    r"""Divide parameter names into blocks, head and frozen rest.

    Without ``stack`` and ``blocks``, every layer of the longest stack of equal layers
    is a block; of those, where that is known, that the output needs.

    Parameters
    ----------
    names
        Parameter names in the order in which the modules run, which
        ``model.named_parameters()`` or a state dict mostly, but not always, gives; use
        ``model_partition`` where the model is at hand. Leave out names of tied weights
        (a language model's ``lm_head``).
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
    behind
        Tells which parameters run behind, or beside, some others (default: their order
        does).

    Returns
    -------
    BlockPartition
        Blocks in depth order.

    Raises
    ------
    BlocksNotFound
        No stack of at least two equal layers, several of the same length or one behind
        the other, a stack or block that no name belongs to, or names that are not in
        model order, or may not be.
    """
    names = tuple(names)
    parameters = [name for name in names if not name.endswith(_BUFFERS)]
    shared: set[str] = set()
    by_order = behind is None
    if behind is None:
        _refuse_alphabetical_order(parameters)
        shared = {name for name in parameters if SHARED_BY_LAYERS.search(name)}
        behind = _behind_by_order(parameters, shared)
    if blocks is None:
        found = blocks_of_stack(parameters, stack, behind)
        if by_order:
            _refuse_unknown_order(parameters, found)
    elif stack is None:
        found = _blocks_by_hand(parameters, blocks)
    else:
        raise BlocksNotFound("Give stack=... or blocks=..., not both.")
    trained = tuple(
        tuple(name for name in block if name not in shared) for block in found
    )
    head = _head(parameters, {name for block in found for name in block}, behind)
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
    return tuple(n for n in names[first:] if not SHARED_BY_LAYERS.search(n))


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


def _refuse_unknown_order(names: Sequence[str], blocks: Sequence[list[str]]) -> None:
    """Refuse what stands in front of a base model that has embeddings of its own.

    It may be a stem, which feeds the base model, or a classifier that it feeds.
    """
    base = f"{blocks[0][0].partition('.')[0]}."
    inside = [name for name in names if name.startswith(base)]
    in_blocks = {name for block in blocks for name in block}
    if names[0] not in inside and in_blocks <= set(inside) - {inside[0]}:
        raise BlocksNotFound(
            f"{names[0]} stands in front of {inside[0]}, and names do not tell whether "
            f"it runs before or behind {base.removesuffix('.')!r}: divide the model "
            "with model_partition, which sees it on an example."
        )


def _behind_by_order(names: Sequence[str], shared: set[str]) -> Behind:
    """Take the order of names for that in which their modules run."""
    places = {name: place for place, name in enumerate(names)}

    def behind(inside: Collection[str]) -> Sequence[str]:
        if not inside:
            return names
        feeding = set(shared)
        # What stands beside shared relative positions (as DeBERTa's encoder.LayerNorm
        # does) prepares them for all layers.
        for container in {n.rsplit(".", 2)[0] for n in shared.difference(inside)}:
            feeding |= {name for name in names if name.startswith(f"{container}.")}
        later = names[max(places[name] for name in inside) + 1 :]
        return [name for name in later if name not in feeding]

    return behind


def _head(names: Sequence[str], in_blocks: set[str], behind: Behind) -> tuple[str, ...]:
    """Find the parameters behind the blocks that back-propagation passes first."""
    excluded = set(in_blocks)
    for layers in containers_of(names).values():
        stack = names_of(layers)
        if are_modules(layers) and in_blocks.isdisjoint(stack):
            excluded |= stack
    candidates = set(behind(in_blocks)) - excluded
    return tuple(name for name in names if name in candidates)


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
                f"({sample_of(names)}), up to a dot or the end."
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
