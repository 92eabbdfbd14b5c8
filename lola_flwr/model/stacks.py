"""The stacks of layers among a model's parameter names."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from lola_flwr.errors import UserError

# A name inside a container of numbered modules: "<container>.<number>.<parameter>".
# The lazy prefix finds the outermost number, so that lists inside a layer stay inside.
_NUMBERED = re.compile(r"(.+?)\.\d+\..+")

# Parameters that stand behind the stack in model order but feed every layer of it, as
# DeBERTa's relative positions do: their gradient needs the whole stack.
SHARED_BY_LAYERS = re.compile(r"rel_embeddings|relative_attention_bias")

# A normalisation's own parameter: "attn_norm.weight", "ln_1.bias".
_OF_NORM = re.compile(r"(norm|(^|[._])ln)[^.]*\.[^.]+$", re.IGNORECASE)

# The layers of a stack: number -> parameter within the layer -> its full name.
Layers = Mapping[int, Mapping[str, str]]

# Tells which parameters run behind, or beside, some others.
Behind = Callable[[Collection[str]], Collection[str]]


class BlocksNotFound(UserError):
    """The names do not show one stack of equal layers, or no such blocks.

    Parameters
    ----------
    message
        What is wrong, and what to do.
    stacks
        Stacks that can be chosen with ``stack=``.
    blocks
        A regular expression that can be given as ``blocks=``; "" if none is known.
    """

    def __init__(
        self, message: str, stacks: Iterable[str] = (), blocks: str = ""
    ) -> None:
        super().__init__(message)
        self.stacks = tuple(stacks)
        self.blocks = blocks


def blocks_of_stack(
    names: Sequence[str], stack: str | None, behind: Behind
) -> list[list[str]]:
    """Collect the names of each layer of a stack: a given one, or the longest."""
    containers = containers_of(names)
    if stack is None:
        stack = _longest_stack(containers, names, behind)
    layers = _layers_at(names, stack)
    if len(layers) < 2:
        known = ", ".join(filter(None, sorted(containers))) or "none"
        raise BlocksNotFound(
            f"No stack of layers at stack={stack!r}; the stacks found are: {known}.",
            filter(None, containers),
        )
    if list(layers) != list(range(len(layers))):
        raise BlocksNotFound(
            f"The layers of {stack!r} are numbered {list(layers)}; expected 0 to "
            f"{len(layers) - 1} without gaps, in this order. Pass the names of the "
            "whole model in model order; or, if the modules between have no "
            f"parameters, blocks='{_pattern_of(stack)}'."
        )
    return [list(layer.values()) for layer in layers.values()]


def containers_of(names: Sequence[str]) -> dict[str, Layers]:
    """Collect the outermost containers of at least two numbered modules."""
    # A model that is an nn.Sequential has numbers in front.
    top = _layers_at(names, "")
    if len(top) >= 2 and (_are_equal(top) or _are_equal_but_for_norms(top)):
        return {"": top}
    matches = [_NUMBERED.fullmatch(name) for name in names]
    prefixes = ["", *dict.fromkeys(match[1] for match in matches if match)]
    containers = {prefix: _layers_at(names, prefix) for prefix in prefixes}
    return {prefix: layers for prefix, layers in containers.items() if len(layers) >= 2}


def are_modules(layers: Layers) -> bool:
    """Tell a stack of layers from a head of plain modules (Linear, ReLU, Linear)."""
    return any("." in inner for layer in layers.values() for inner in layer)


def names_of(layers: Layers) -> set[str]:
    """Return the full names of a stack's parameters."""
    return {name for layer in layers.values() for name in layer.values()}


def sample_of(names: Sequence[str]) -> str:
    """Show the first of some names, for a message."""
    return f"{', '.join(names[:3])}, ..." if names else "no parameters at all"


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
    first, *others = (
        {inner for inner in layer if not SHARED_BY_LAYERS.search(inner)}
        for layer in layers.values()
    )
    return all(layer == first for layer in others)


def _are_equal_but_for_norms(layers: Layers) -> bool:
    """Tell whether layers differ in norms alone.

    ModernBERT's first layer lacks one, as what is before it ends with one.
    """
    rest = {
        number: {
            inner: name for inner, name in layer.items() if not _OF_NORM.search(inner)
        }
        for number, layer in layers.items()
    }
    return any(rest.values()) and _are_equal(rest)


def _longest_stack(
    containers: Mapping[str, Layers], names: Sequence[str], behind: Behind
) -> str:
    """Choose the stack with most layers; refuse to guess between equals."""
    # What never runs, as layers for images where the example has none, is not meant.
    needed = set(behind(()))
    running = {p: c for p, c in containers.items() if needed & names_of(c)}
    containers = running or containers
    # Beside numbered modules, plain ones (Linear, ReLU, Linear) are a classifier.
    modules = {prefix: c for prefix, c in containers.items() if are_modules(c)}
    candidates = modules or containers
    # Layers that differ in a norm are taken where none are equal: wav2vec2's first
    # convolution has one, but its stack is the transformer's.
    for alike in (_are_equal, _are_equal_but_for_norms):
        stacks = {prefix: c for prefix, c in candidates.items() if alike(c)}
        if stacks:
            break
    else:
        first, *more = candidates or [""]
        which = f"one of {', '.join(candidates)}" if more else repr(first)
        alone = "" if candidates else _module_alone(names)
        raise BlocksNotFound(
            "No stack of at least two equal layers among the parameter names "
            f"({sample_of(names)}). "
            + (
                f"The modules of {' and '.join(map(repr, candidates))} are unlike each "
                "other; to make each a block all the same, name their stack with "
                f"stack={which}, or name"
                if candidates
                else "Name"
            )
            + f" the blocks with blocks='{alone or '...'}', a regular expression of "
            "what their names begin with; layers that share their parameters, as "
            "ALBERT's do, are one block.",
            filter(None, candidates),
            alone,
        )
    if not modules and len(containers) > 1:
        raise BlocksNotFound(
            f"The stacks that the names show ({', '.join(list(containers)[:3])}) "
            "are of plain modules, and parts of something larger: divide the model "
            "with found_blocks(model), of lola_flwr.model.found, which sees its "
            "modules, or name the blocks with blocks='...', a regular expression of "
            "what their names begin with."
        )
    length = max(map(len, stacks.values()))
    longest = [prefix for prefix, layers in stacks.items() if len(layers) == length]
    if len(longest) > 1:
        raise BlocksNotFound(
            f"{len(longest)} stacks have {length} layers: {', '.join(longest)}. "
            f"Choose one, as with stack={longest[0]!r}.",
            longest,
        )
    inside = names_of(stacks[longest[0]])
    later = set(behind(inside))
    named = {prefix: names_of(layers) for prefix, layers in modules.items()}
    others = [p for p, names in named.items() if names & later and not names & inside]
    if others:
        raise BlocksNotFound(
            f"Behind the layers of {longest[0]!r} stand those of {others[0]!r}. Choose "
            f"one, as with stack={longest[0]!r} (the other stays frozen), or name the "
            f"blocks of both, with blocks='{_pattern_of(longest[0], *others)}'.",
            (longest[0], *others),
        )
    return longest[0]


def _module_alone(names: Sequence[str]) -> str:
    """Spell the module that is alone in its list; "" if there is not just one such.

    ALBERT runs it again and again.
    """
    matches = [_NUMBERED.fullmatch(name) for name in names]
    prefixes = dict.fromkeys(match[1] for match in matches if match)
    return _pattern_of(*prefixes, number="0") if len(prefixes) == 1 else ""


def _pattern_of(*stacks: str, number: str = r"\d+") -> str:
    """Spell the regular expression whose matches are the modules of stacks."""
    prefixes = [re.escape(f"{stack}.") if stack else "" for stack in stacks]
    either = prefixes[0] if len(prefixes) == 1 else f"({'|'.join(prefixes)})"
    return f"{either}{number}"
