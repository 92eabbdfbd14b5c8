"""Find a model's sub-networks, and see that their sum is what its layers compute."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from lola_flwr.d2ft.execution import run_layer
from lola_flwr.d2ft.operations import Operation
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

_KNOWN = "sub-networks are known of BERT, RoBERTa, DistilBERT and ViT layers"

# Where the parts of a layer are found: BERT and RoBERTa; ViT as of transformers 5; ViT
# before; DistilBERT. The first name of each is that of the parameters' owner.
_PLACES: dict[str, tuple[str, ...]] = {
    "query": (
        "attention.self.query",
        "attention.q_proj",
        "attention.attention.query",
        "attention.q_lin",
    ),
    "key": (
        "attention.self.key",
        "attention.k_proj",
        "attention.attention.key",
        "attention.k_lin",
    ),
    "value": (
        "attention.self.value",
        "attention.v_proj",
        "attention.attention.value",
        "attention.v_lin",
    ),
    "project": ("attention.output.dense", "attention.o_proj", "attention.out_lin"),
    "up": ("intermediate.dense", "mlp.fc1", "ffn.lin1"),
    "activation": (
        "intermediate.intermediate_act_fn",
        "mlp.activation_fn",
        "ffn.activation",
    ),
    "down": ("output.dense", "mlp.fc2", "ffn.lin2"),
    "norm_1": ("attention.output.LayerNorm", "layernorm_before", "sa_layer_norm"),
    "norm_2": ("output.LayerNorm", "layernorm_after", "output_layer_norm"),
    "num_heads": (
        "attention.self.num_attention_heads",
        "attention.num_attention_heads",
        "attention.attention.num_attention_heads",
        "attention.n_heads",
    ),
}
_OPTIONAL: dict[str, tuple[str, ...]] = {
    "attention_dropout": (
        "attention.self.dropout",
        "attention.attention_dropout",
        "attention.attention.dropout_prob",
        "attention.dropout",
    ),
    "dropout_1": ("attention.output.dropout", "dropout"),
    "dropout_2": ("output.dropout", "dropout", "ffn.dropout"),
}


def find_subnetworks(
    model: nn.Module, partition: BlockPartition, *, num_groups: int | None = None
) -> Subnetworks:
    """Cut a model's layers into sub-networks.

    Parameters
    ----------
    model
        A model of the families BERT, RoBERTa, DistilBERT or ViT, perhaps with low-rank
        adapters.
    partition
        Its blocks, each of them a layer or the adapters in one.
    num_groups
        Groups to divide each layer's heads into (default: one for each head).

    Raises
    ------
    LayerNotUnderstood
        A layer is of none of these families, or computes something else for all that
        its parts are called as theirs.
    UserError
        There are not so many heads.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    layers = tuple(
        _parts(model.get_submodule(name), name, num_groups)
        for name in layer_names(partition)
    )
    if model not in _seen:
        _check(model, layers)
        _seen.add(model)
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


# With what a layer is called: arguments by place, and by name.
_Call = tuple[tuple[Any, ...], dict[str, Any]]

# Models whose layers were seen to be what they are taken for.
_seen: WeakSet[nn.Module] = WeakSet()


def _check(model: nn.Module, layers: Sequence[LayerParts]) -> None:
    """Compare what each layer computes with the sum of its sub-networks.

    Parts of the same names do not make the same layer: attention may be approximate,
    or turned by positions. Layers are called as the model calls them.
    """
    reason = "its kind of input is not known"
    for example in examples_of(model):
        with _in_evaluation(model), _recorded(layers) as calls:
            failure = failure_of(model, example)
        if failure is None:
            for parts in layers:
                _compare(parts, calls.get(parts.layer))
            return
        reason = reason_of(failure)
    raise LayerNotUnderstood(
        f"{type(model).__name__} could not be run to see whether its layers are what "
        f"they look like ({reason}); {_KNOWN}."
    )


def _compare(parts: LayerParts, call: _Call | None) -> None:
    kind = type(parts.layer).__name__
    try:
        apart = _difference(parts, call)
    # A layer that is called otherwise, or whose parts have other sizes.
    except Exception as error:
        raise LayerNotUnderstood(
            f"{kind} is none of the known layers for all the names of its parts "
            f"({reason_of(error)}); {_KNOWN}."
        ) from error
    if not apart < 1e-3:
        raise LayerNotUnderstood(
            f"{kind} computes something else than its sub-networks together (relative "
            f"difference {apart:.0e}); {_KNOWN}."
        )


def _difference(parts: LayerParts, call: _Call | None) -> float:
    """Return how far a layer is from the sum of its sub-networks, at random weights.

    At those of a new model attention is next to uniform, whatever it computes.
    """
    if call is None:
        raise ValueError("the model does not call it")
    layer = copy.deepcopy(parts.layer).cpu().float().eval()
    drawn = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, values in layer.named_parameters():
            if values.dim() == 1:
                middle = float(name.endswith("weight"))
                values.uniform_(middle - 0.5, middle + 0.5, generator=drawn)
            else:
                values.normal_(0, values.shape[-1] ** -0.5, generator=drawn)
        arguments = tuple(map(_plain, call[0]))
        named = {name: _plain(value) for name, value in call[1].items()}
        mask = arguments[1] if len(arguments) > 1 else named.get("attention_mask")
        shape = (arguments[0] if arguments else named["hidden_states"]).shape
        hidden = torch.randn(shape, generator=drawn)
        if arguments:
            arguments = (hidden, *arguments[1:])
        else:
            named["hidden_states"] = hidden
        output = layer(*arguments, **named)
        own = output[0] if isinstance(output, tuple) else output
        copied = _parts(layer, type(layer).__name__, parts.num_groups)
        total = run_layer(copied, [Operation.FULL] * parts.num_groups, hidden, mask)
    return float((total - own).abs().max() / own.abs().max())


def _plain(value: Any) -> Any:
    """Put a tensor where, and into the type, that layers are compared in."""
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
def _recorded(layers: Sequence[LayerParts]) -> Iterator[dict[nn.Module, _Call]]:
    """Note with what layers are called."""
    calls: dict[nn.Module, _Call] = {}

    def note(module: nn.Module, arguments: Any, named: Any) -> None:
        calls[module] = arguments, dict(named)

    hooks = [
        parts.layer.register_forward_pre_hook(note, with_kwargs=True)
        for parts in layers
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _parts(layer: nn.Module, name: str, num_groups: int | None) -> LayerParts:
    found: dict[str, Any] = {}
    for part, places in _PLACES.items():
        values = [value for p in places if (value := _at(layer, p)) is not None]
        if not values:
            raise LayerNotUnderstood(
                f"{name} ({type(layer).__name__}) has no {part} at any of "
                f"{', '.join(places)}; {_KNOWN}."
            )
        found[part] = values[0]
    for part, places in _OPTIONAL.items():
        found[part] = next((v for p in places if (v := _at(layer, p)) is not None), 0.0)
    rate = found.pop("attention_dropout")
    num_heads = found.pop("num_heads")
    num_groups = num_heads if num_groups is None else num_groups
    if type(num_groups) is not int or not 1 <= num_groups <= num_heads:
        raise UserError(
            f"num_groups={num_groups!r} must be a whole number from 1 to {num_heads}, "
            f"the heads of {name}."
        )
    for dropout in ("dropout_1", "dropout_2"):
        if not isinstance(found[dropout], nn.Module):
            found[dropout] = nn.Identity()
    return LayerParts(
        layer=layer,
        norm_first=hasattr(layer, "layernorm_before"),
        attention_dropout=float(getattr(rate, "p", rate)),
        num_heads=num_heads,
        num_groups=num_groups,
        **found,
    )


def _at(layer: Any, place: str) -> Any:
    for name in place.split("."):
        layer = getattr(layer, name, None)
    return layer
