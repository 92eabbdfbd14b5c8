"""Where a layer's parts are: seen in the order in which they run, not by its family.

A layer that can be divided is attention, then a feed-forward network, each of them
added to what it is given. Its linear maps run in one order whatever they are called:
query, key and value, or one map for all three; the projection back; one or two maps up;
the one down. Between the latter is the activation, and around them normalisations and
dropout, as far as there are any; perhaps a normalisation of queries and one of keys.
That the layer computes no more than this is for `lola_flwr.d2ft.find` to see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from lola_flwr.d2ft.maps import is_linear


class OtherStructure(Exception):
    """A layer does not consist of such parts; says what it does otherwise."""


@dataclass(frozen=True)
class Structure:
    """Names of a layer's parts inside of it; empty where it has none.

    Parameters
    ----------
    inputs
        Query, key and value projection, or one for all three.
    project
        The projection back.
    query_norm, key_norm
        Normalisations of each head's queries and keys.
    ups
        Maps up; of two the first is the one that the activation is of.
    down
        The map down.
    activation
        The activation.
    norm_1, norm_2
        Normalisations of attention and feed-forward network.
    norm_first
        Whether they are before them, or after what they are added to.
    dropout_1, dropout_2
        Dropouts of what the two projections give.
    inner_dropout
        That of what the map down is given.
    """

    inputs: tuple[str, ...]
    project: str
    query_norm: str
    key_norm: str
    ups: tuple[str, ...]
    down: str
    activation: str
    norm_1: str
    norm_2: str
    norm_first: bool
    dropout_1: str
    dropout_2: str
    inner_dropout: str


def structure_of(layer: nn.Module, run: Callable[[], object]) -> Structure:
    """See what a layer consists of.

    Parameters
    ----------
    layer
        The layer.
    run
        Calls it once.

    Raises
    ------
    OtherStructure
        It does not consist of attention and a feed-forward network alone.
    """
    called = _called(layer, run)
    kinds = {name: _kind(layer.get_submodule(name)) for name in called}
    maps = [name for name in called if kinds[name] == "map"]
    if len(maps) not in (4, 5, 6, 7) or len(set(maps)) != len(maps):
        raise OtherStructure(
            f"runs {len(maps)} linear maps ({', '.join(maps[:9])}) where attention and "
            "a feed-forward network together have 4 to 7"
        )
    count = 1 if len(maps) < 6 else 3
    inputs, project, ups, down = (
        maps[:count],
        maps[count],
        maps[count + 1 : -1],
        maps[-1],
    )
    # In the order in which modules are called: before attention, in front of the
    # maps up, before the map down, and behind it.
    start, back, up, end = (
        called.index(name) for name in (inputs[0], project, ups[0], down)
    )
    before, between = called[:start], called[back + 1 : up]
    inside, after = called[up + 1 : end], called[end + 1 :]

    def one(kind: str, names: list[str]) -> str:
        found = [name for name in names if kinds[name] == kind]
        if len(found) > 1:
            raise OtherStructure(f"has {' and '.join(found)}, of which one is known")
        return found[0] if found else ""

    if odd := [name for name in inside if kinds[name] == "norm"]:
        raise OtherStructure(
            f"normalises inside of its feed-forward network ({odd[0]})"
        )
    query_norm, key_norm = _head_norms(
        [name for name in called[start:back] if kinds[name] == "norm"]
    )
    norms = [one("norm", names) for names in (before, between, after)]
    norm_first = bool(norms[0]) or not norms[2]
    if norms[0] and norms[2]:
        raise OtherStructure(
            f"normalises before and behind its branches ({norms[0]}, {norms[2]})"
        )
    activation = one("other", inside)
    if not activation:
        raise OtherStructure("has no activation as a module of its own")
    # Of two maps up that which ran last before it.
    activated = [name for name in called[: called.index(activation)] if name in ups][-1]
    return Structure(
        inputs=_in_order(inputs),
        project=project,
        query_norm=query_norm,
        key_norm=key_norm,
        ups=(activated, *(name for name in ups if name != activated)),
        down=down,
        activation=activation,
        norm_1=norms[0] if norm_first else norms[1],
        norm_2=norms[1] if norm_first else norms[2],
        norm_first=norm_first,
        dropout_1=one("dropout", between),
        dropout_2=one("dropout", after),
        inner_dropout=one("dropout", inside),
    )


def _called(layer: nn.Module, run: Callable[[], object]) -> list[str]:
    """Return the names of the innermost modules, adapters whole, in order of calls."""
    called: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *_: called.append(name)

    hooks = [
        module.register_forward_pre_hook(note(name)) for name, module in _leaves(layer)
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return called


def _leaves(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if hasattr(child, "base_layer") or not any(child.children()):
            yield prefix + name, child
        else:
            yield from _leaves(child, f"{prefix}{name}.")


def _kind(module: Any) -> str:
    name = type(module).__name__.lower()
    if is_linear(getattr(module, "base_layer", module)):
        return "map"
    shapes = [parameter.dim() for parameter in module.parameters()]
    if "norm" in name or (shapes and max(shapes) == 1):
        return "norm"
    if isinstance(module, nn.Identity):
        return "nothing"
    return "dropout" if "dropout" in name else "other"


def _in_order(names: list[str]) -> tuple[str, ...]:
    """Put three maps into the order query, key, value, as their names begin."""
    if len(names) == 1:
        return (names[0],)
    initials = {name.rpartition(".")[2][:1].lower(): name for name in names}
    if sorted(initials) != ["k", "q", "v"]:
        raise OtherStructure(
            f"has the maps {', '.join(names)} where names that begin with q, k and v "
            "are known"
        )
    return tuple(initials[letter] for letter in "qkv")


def _head_norms(names: list[str]) -> tuple[str, str]:
    """Return the normalisations of queries and of keys, where there are such."""
    initials = [name.rpartition(".")[2][:1].lower() for name in names]
    if initials not in ([], ["q", "k"]):
        raise OtherStructure(f"normalises inside of its attention ({names[0]})")
    return (names[0], names[1]) if names else ("", "")
