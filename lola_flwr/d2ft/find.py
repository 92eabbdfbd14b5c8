"""Find a model's sub-networks, and see that their sum is what its layers compute."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from inspect import signature
from itertools import product
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lola_flwr.d2ft.execution import named_arguments, run_layer, told
from lola_flwr.d2ft.maps import base_of, in_features, is_linear
from lola_flwr.d2ft.operations import Operation
from lola_flwr.d2ft.structure import OtherStructure, Structure, structure_of
from lola_flwr.d2ft.subnetworks import (
    Branch,
    LayerNotUnderstood,
    LayerParts,
    Subnetworks,
    branch_slices,
    layer_names,
)
from lola_flwr.errors import UserError, reason_of
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.model.example import examples_of
from lola_flwr.model.inputs import failure_of
from lola_flwr.model.ladder import is_ladder

_KNOWN = (
    "sub-networks are cut out of layers of attention and a feed-forward network, as "
    "those of BERT, ViT, ModernBERT, GPT-2 and Llama"
)

# What modules of attention call the width of a head, and their number; and the rate of
# attention weights that are dropped. What is called otherwise is found out below.
_HEAD_SIZE = ("head_dim", "attention_head_size", "head_size")
_NUM_HEADS = ("num_heads", "num_attention_heads", "n_heads")
_DROPOUT = ("attention_dropout", "attn_dropout", "dropout", "dropout_prob")


def find_subnetworks(
    model: nn.Module, partition: BlockPartition, *, num_groups: int | None = None
) -> Subnetworks:
    """Cut a model's layers into sub-networks.

    Parameters
    ----------
    model
        A transformer whose layers are attention and a feed-forward network, perhaps
        with low-rank adapters.
    partition
        Its blocks, each of them a layer or the adapters in one.
    num_groups
        Groups to divide each layer's heads into (default: one for each head of keys
        and values).

    Raises
    ------
    LayerNotUnderstood
        A layer has other parts, or computes something else than their sum.
    UserError
        There are not so many heads.
    """
    if is_ladder(model):
        raise LayerNotUnderstood(
            "Under tuning='ladder' layers stand beside each other, and are no chain of "
            f"sub-networks; {_KNOWN}: use tuning='lora', or another method than D2FT."
        )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    structures = _structures_of(model, layer_names(partition))
    layers = tuple(
        _parts(model.get_submodule(name), name, structure, num_groups)
        for name, structure in structures.items()
    )
    slices = tuple(
        tuple(
            part
            for branch in Branch
            for part in branch_slices(parts, branch, group, group + 1, names)
        )
        for parts in layers
        for group in range(parts.num_groups)
    )
    return Subnetworks(layers, slices)


def forget(model: nn.Module) -> None:
    """Forget what a model's layers consist of: who changed them has it seen anew."""
    _seen.pop(model, None)


# With what a layer is called, by name; hidden states first.
_Call = dict[str, Any]

# Relative difference up to which two ways of computing a layer are the same.
_ALIKE = 1e-3

# What layers consist of, by name, of models in which it was seen.
_seen: WeakKeyDictionary[nn.Module, dict[str, Structure]] = WeakKeyDictionary()


def _structures_of(model: nn.Module, names: Sequence[str]) -> dict[str, Structure]:
    """Return what a model's layers consist of.

    Each layer is called as the model calls it, and what it computes compared with the
    sum of its sub-networks: parts of the same kinds do not make the same layer.
    """
    seen = _seen.setdefault(model, {})
    if unseen := [name for name in names if name not in seen]:
        calls = _calls_of(model, unseen)
        seen.update({n: _seen_in(model.get_submodule(n), n, calls[n]) for n in unseen})
    return {name: seen[name] for name in names}


def _calls_of(model: nn.Module, names: Sequence[str]) -> dict[str, list[_Call]]:
    """Return with what a model calls its layers: without padding, and with."""
    calls: dict[str, list[_Call]] = {name: [] for name in names}
    reason = ""
    for example in _examples(model):
        with _in_evaluation(model), _recorded(model, calls):
            failure = failure_of(model, example)
        if failure is not None:
            reason = f" ({reason_of(failure)})"
            break
    else:
        if all(calls.values()):
            return calls
    raise LayerNotUnderstood(
        f"{type(model).__name__} could not be run to see whether its layers are what "
        f"they look like{reason}; {_KNOWN}."
    )


def _examples(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    for example in examples_of(model):
        yield example
        base: Any = getattr(model, "get_base_model", lambda: model)()
        tokens = example.get("input_ids")
        if (
            tokens is not None
            and "attention_mask" in signature(base.forward).parameters
        ):
            mask = torch.ones_like(tokens)
            mask[..., -1] = 0
            yield {**example, "attention_mask": mask}


def _seen_in(layer: nn.Module, name: str, calls: Sequence[_Call]) -> Structure:
    kind = type(layer).__name__
    for module in layer.modules():
        if is_linear(module):
            base_of(module)
    try:
        copied = _at_random(layer)
        drawn = [_drawn(call) for call in calls]
        structure = structure_of(copied, lambda: copied(**drawn[0]))
        parts = _parts(copied, name, structure, None)
        for training, named in product((False, True), drawn):
            apart = _difference(parts, named, training=training)
            if not apart < _ALIKE:
                raise OtherStructure(
                    "computes something else than its sub-networks together (relative "
                    f"difference {apart:.0e}"
                    + (", in training only: by its dropout)" if training else ")")
                )
    except OtherStructure as other:
        raise LayerNotUnderstood(f"{name} ({kind}) {other}; {_KNOWN}.") from other
    except UserError:
        raise
    # A layer that is called otherwise, or whose parts have other sizes.
    except Exception as error:
        raise LayerNotUnderstood(
            f"{name} ({kind}) does not run as such a layer would ({reason_of(error)}); "
            f"{_KNOWN}."
        ) from error
    return structure


@torch.no_grad()
def _at_random(layer: nn.Module) -> nn.Module:
    """Return a copy of a layer at random weights.

    At those of a new model attention is next to uniform, whatever it computes.
    """
    copied = copy.deepcopy(layer).cpu().float().eval()
    drawn = torch.Generator().manual_seed(0)
    for name, values in copied.named_parameters():
        if values.dim() == 1:
            middle = float(name.endswith("weight"))
            values.uniform_(middle - 0.5, middle + 0.5, generator=drawn)
        else:
            values.normal_(0, values.shape[-1] ** -0.5, generator=drawn)
    # An adapter's own draws are not the layer's.
    for adapter in copied.modules():
        for module in adapter.modules() if hasattr(adapter, "base_layer") else ():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    return copied


def _drawn(call: _Call) -> _Call:
    """Return a call of a layer at random hidden states."""
    named = {name: _plain(value) for name, value in call.items()}
    hidden = next(iter(named))
    drawn = torch.Generator().manual_seed(1)
    return {**named, hidden: torch.randn(named[hidden].shape, generator=drawn)}


@torch.no_grad()
def _difference(
    parts: LayerParts, named: Mapping[str, Any], *, training: bool
) -> float:
    """Return how far a layer is from the sum of its sub-networks.

    In training both draw what they drop from the same numbers.
    """
    parts.layer.train(training)
    hidden, context = told(parts.layer, (), named)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        output = parts.layer(**named)
        torch.default_generator.manual_seed(0)
        total = run_layer(parts, [Operation.FULL] * parts.num_groups, hidden, context)
    own = output[0] if isinstance(output, tuple) else output
    return float((total - own).abs().max() / own.abs().max())


def _plain(value: Any) -> Any:
    """Put tensors where, and into the type, that layers are compared in."""
    from transformers.cache_utils import Cache

    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    if isinstance(value, Cache):
        return None  # it would remember the calls before
    if not isinstance(value, Tensor):
        return value
    return value.cpu().float() if value.is_floating_point() else value.cpu()


@contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _recorded(model: nn.Module, calls: Mapping[str, list[_Call]]) -> Iterator[None]:
    """Note with what layers are called."""

    def note(name: str) -> Callable[..., None]:
        def noted(module: nn.Module, arguments: Any, named: Any) -> None:
            calls[name].append(named_arguments(module, arguments, named))

        return noted

    hooks = [
        model.get_submodule(n).register_forward_pre_hook(note(n), with_kwargs=True)
        for n in calls
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _parts(
    layer: nn.Module, name: str, structure: Structure, num_groups: int | None
) -> LayerParts:
    def at(place: str) -> nn.Module:
        return layer.get_submodule(place) if place else nn.Identity()

    inputs = tuple(map(at, structure.inputs))
    project = at(structure.project)
    attention = _holders(layer, structure.inputs[0])
    width = in_features(project)
    head_size = _first(attention, _HEAD_SIZE, int)
    if head_size is None and (num_heads := _first(attention, _NUM_HEADS, int)):
        head_size = width // num_heads
    if not head_size:
        raise OtherStructure(f"has no {', '.join((*_HEAD_SIZE, *_NUM_HEADS))}")
    scale = _first(attention, ("scaling",), float)
    if scale is not None and math.isclose(scale, head_size**-0.5):
        scale = None
    rate = _first(attention, _DROPOUT, (float, nn.Dropout)) or 0.0
    module = sys.modules[type(attention[0]).__module__]
    parts = LayerParts(
        layer=layer,
        inputs=inputs,
        project=project,
        query_norm=at(structure.query_norm),
        key_norm=at(structure.key_norm),
        ups=tuple(map(at, structure.ups)),
        down=at(structure.down),
        activation=at(structure.activation),
        norm_1=at(structure.norm_1),
        norm_2=at(structure.norm_2),
        norm_first=structure.norm_first,
        dropout_1=at(structure.dropout_1),
        dropout_2=at(structure.dropout_2),
        inner_dropout=at(structure.inner_dropout),
        attention_dropout=float(getattr(rate, "p", rate)),
        head_size=head_size,
        scale=scale,
        is_causal=bool(getattr(attention[0], "is_causal", False)),
        rotate=getattr(module, "apply_rotary_pos_emb", None),
        num_groups=1,
    )
    most = parts.num_key_heads
    num_groups = most if num_groups is None else num_groups
    if type(num_groups) is not int or not 1 <= num_groups <= most:
        shared = most < parts.num_heads
        raise UserError(
            f"num_groups={num_groups!r} must be a whole number from 1 to {most}, the "
            f"{'key/value ' * shared}heads of {name}"
            + (", which its query heads share." if shared else ".")
        )
    return replace(parts, num_groups=num_groups)


def _holders(layer: nn.Module, place: str) -> list[nn.Module]:
    """Return the modules inside a layer that hold another one, the nearest first."""
    names = place.split(".")[:-1]
    return [
        layer.get_submodule(".".join(names[:length]))
        for length in range(len(names), 0, -1)
    ]


def _first(holders: Sequence[nn.Module], names: Sequence[str], kinds: Any) -> Any:
    """Return the first attribute of some names, of one of some kinds."""
    found = (getattr(holder, name, None) for holder in holders for name in names)
    return next((value for value in found if isinstance(value, kinds)), None)
