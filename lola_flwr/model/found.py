r"""The blocks of any model that is none of transformers: found in its modules.

Modules are opened from the outside on, down to *layers*: modules with modules in them
whose names differ in a number alone, as a ResNet's ``layer1`` to ``layer4``, a ViT's
``encoder_layer_0``, ``encoder_layer_1``, or what an ``nn.Sequential`` or a
``ModuleList`` holds. Each layer is a block, with what runs right before it, as a stem.
What is in no layer is plain modules, as a CNN's or an MLP's: each is a block, with the
norm behind it. What runs last is the head, unless it is a layer. Modules that run
beside each other are one block.

What runs when is seen in a forward pass. Every parameter that wants a gradient is in a
block or in the head.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from lola_flwr.errors import UserError
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.model.example import spelled
from lola_flwr.model.plain_input import plain_input, required_arguments
from lola_flwr.model.stacks import sample_of
from lola_flwr.model.trace import Example, Trace, traced

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Piece:
    """Parameters that stay together.

    Parameters
    ----------
    names
        Their names.
    path
        The module that they are; "" where they are several.
    is_layer
        Whether they are a layer: a block of its own.
    is_wide
        Whether they are more than a norm or a scale, which belong to something.
    """

    names: tuple[str, ...]
    path: str
    is_layer: bool
    is_wide: bool

    @staticmethod
    def joined(pieces: Iterable[Piece]) -> Piece:
        """Put pieces together."""
        parts = tuple(pieces)
        return Piece(
            tuple(name for part in parts for name in part.names),
            parts[0].path if len(parts) == 1 else "",
            any(part.is_layer for part in parts),
            any(part.is_wide for part in parts),
        )


def found_blocks(
    model: nn.Module, example: Example | None = None, *, sequence_length: int = 1
) -> tuple[BlockPartition, Example]:
    """Divide a model into blocks and head, by its modules.

    Parameters
    ----------
    model
        The model. Parameters that want no gradient (``requires_grad=False``) are
        frozen, and no others are.
    example
        The model's input for an example: its first argument, or its arguments by name
        (default: found, where the model takes no other size).
    sequence_length
        Tokens of an example; 1 where examples are no sequences.

    Returns
    -------
    partition
        Blocks, in the order in which they run, and head.
    example
        What they were found on, and costs can be counted on.

    Raises
    ------
    BlocksNotFound
        No parameter wants a gradient.
    UserError
        The model's input is not known; what to pass is said, with the blocks. Or the
        model cannot be run on the example.
    """
    if example is not None:
        return divided(model, traced(model, example)), example
    found = plain_input(model, sequence_length)
    name = type(model).__name__
    if found.example is None:
        raise UserError(_nothing_found(model))
    partition = divided(model, traced(model, found.example))
    text = spelled(found.example)
    if not found.known:
        raise UserError(
            f"{name} takes inputs of more than one size, and its costs are counted on "
            f"one: pass blocks={spelled_blocks(model, partition)}, example={text}, "
            "with the size that your devices train on in place of this one."
        )
    _logger.info("%s reads %s; pass example= if it is another size", name, text)
    return partition, found.example


def divided(model: nn.Module, trace: Trace) -> BlockPartition:
    """Divide a model by its modules, and by what a forward pass has shown."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    frozen |= trace.unrecorded()
    order = [name for name, _ in model.named_parameters()]
    needed = trace.behind(())
    pieces = [p for p in _pieces(model, "", trace) if not needed.isdisjoint(p.names)]
    chain = _last_opened(model, _in_chain(pieces, trace), trace)
    *blocks, head = _blocks_and_head(_in_chain(chain, trace))
    blocks = [block for block in blocks if block] or [head]
    head = [] if blocks == [head] else head
    parts = [*blocks, head]
    origins = [trace.feeding(part) for part in parts]
    rest = [n for n in order if n not in {name for part in parts for name in part}]
    for name in rest:
        # What is no module's own goes to the first that needs it. What this pass does
        # not use may be used in training.
        uses = (i for i, origin in enumerate(origins) if name in origin)
        behind = len(blocks) if name in needed else len(blocks) - 1
        parts[next(uses, behind)].append(name)
    unused = [n for n in rest if n not in needed and n not in frozen]
    if unused:
        _logger.warning(
            "%s.forward does not use %s in evaluation mode: trained with the last "
            "block, and what it costs is counted only if forward uses it in training.",
            type(model).__name__,
            sample_of(unused),
        )
    *blocks, head = [sorted(part, key=order.index) for part in parts]
    partition = BlockPartition(
        blocks=tuple(map(tuple, blocks)), head=tuple(head), frozen=()
    )
    return partition.freezing(frozen)


def spelled_blocks(model: nn.Module, partition: BlockPartition) -> str:
    """Write blocks as Python would: a regular expression for each."""
    parameters = dict(model.named_parameters())
    free = {name for name, p in parameters.items() if not p.requires_grad}
    patterns = [
        "|".join(map(re.escape, _prefixes(block, {*block, *free}, list(parameters))))
        for block in partition.blocks
    ]
    quoted = [f'r"{p}"' if "\\" in p else f'"{p}"' for p in patterns]
    return f"[{', '.join(quoted)}]"


def _prefixes(
    block: Sequence[str], allowed: Collection[str], names: Sequence[str]
) -> list[str]:
    """Return the outermost modules that hold a block and nothing else."""
    found: dict[str, None] = {}
    for name in block:
        parts = name.split(".")
        paths = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
        found[
            next(
                path
                for path in paths
                if all(n in allowed for n in names if f"{n}.".startswith(f"{path}."))
            )
        ] = None
    return list(found)


def _nothing_found(model: nn.Module) -> str:
    arguments = required_arguments(model)
    wanted = ", ".join(f'"{name}": ...' for name in arguments)
    return (
        f"What {type(model).__name__} reads does not follow from the model, and its "
        "blocks and their costs are found on that: pass "
        f"example={f'{{{wanted}}}' if len(arguments) > 1 else '...'}, its input for "
        "an example or more, such as a batch that your devices train on."
    )


def _pieces(module: nn.Module, path: str, trace: Trace) -> list[Piece]:
    """Open a module down to layers and plain modules."""
    children = {
        name: child
        for name, child in module.named_children()
        if _names(trace, f"{path}{name}.")
    }
    opened = {
        name: child
        for name, child in children.items()
        if any(
            trace.feeding(_names(trace, f"{path}{name}.{inner}."))
            for inner, _ in child.named_children()
        )
        and not is_parametrized(child)
    }
    kinds = Counter(map(_kind, opened))
    layers = {name for name in opened if kinds[_kind(name)] > 1 and _kind(name) != name}
    pieces: list[Piece] = []
    for name, child in children.items():
        inside = f"{path}{name}."
        if name in opened and name not in layers:
            pieces += _pieces(child, inside, trace)
        elif names := _names(trace, inside):
            wide = any(p.dim() > 1 for p in child.parameters())
            pieces.append(Piece(names, f"{path}{name}", name in layers, wide))
    return pieces


def _last_opened(
    model: nn.Module, chain: Sequence[Piece], trace: Trace
) -> Sequence[Piece]:
    """Open the last layer to find a head in it, unless it is like the one before."""
    if not chain or not (chain[-1].is_layer and chain[-1].path):
        return chain
    module = model.get_submodule(chain[-1].path)
    before = model.get_submodule(chain[-2].path) if chain[1:] else model

    def shapes(of: nn.Module) -> list[tuple[str, torch.Size]]:
        return [(name, p.shape) for name, p in of.named_parameters()]

    opened = _pieces(module, f"{chain[-1].path}.", trace)
    if any(piece.is_layer for piece in opened) or shapes(module) == shapes(before):
        return chain
    return [*chain[:-1], *opened]


def _kind(name: str) -> str:
    """Return what the names of layers have in common: all but numbers."""
    return re.sub(r"\d+", "#", name)


def _names(trace: Trace, prefix: str) -> tuple[str, ...]:
    return tuple(name for name in trace.bits if name.startswith(prefix))


def _in_chain(pieces: Sequence[Piece], trace: Trace) -> list[Piece]:
    """Sort pieces as they run, and put together those that run beside each other."""
    origins = [trace.feeding(piece.names) for piece in pieces]
    ran = [i for i, p in enumerate(pieces) if not origins[i].isdisjoint(p.names)]
    below = {
        i: {j for j in ran if j != i and not origins[i].isdisjoint(pieces[j].names)}
        for i in ran
    }
    order = sorted(ran, key=lambda index: len(below[index]))
    chain: list[list[int]] = [[]]
    for place, index in enumerate(order, start=1):
        chain[-1].append(index)
        done, later = set(order[:place]), set(order[place:])
        if all(below[i] >= done for i in later) and not any(
            below[i] & later for i in done
        ):
            chain.append([])
    return [Piece.joined(pieces[i] for i in sorted(group)) for group in chain[:-1]]


def _blocks_and_head(chain: Sequence[Piece]) -> Iterator[list[str]]:
    """Give the names of each block, and at last of the head."""
    last = max((i for i, piece in enumerate(chain) if piece.is_layer), default=-1)
    waiting: list[str] = []
    for piece in chain[: last + 1]:
        waiting += piece.names
        if piece.is_layer:
            yield waiting
            waiting = []
    behind: list[list[str]] = []
    for piece in chain[last + 1 :]:
        if behind and not piece.is_wide:
            behind[-1] += piece.names
            continue
        waiting += piece.names
        if piece.is_wide:
            behind.append(waiting)
            waiting = []
    yield from behind
    if waiting or not behind:
        yield waiting
