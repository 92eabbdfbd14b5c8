"""How a ladder begins: as what every r-th feature of a model computes.

A side layer is of the class of the model's own, made for sizes that are smaller by one
factor. Of each axis of a weight it begins with every r-th entry, from one offset on.
Since r divides the features of a head, these are the same features in all layers, in
every head, and in queries, keys and values whether or not they are one matrix: the
side network begins as a part of the model, cut out of it. A matrix is larger by the
root of r, so that sums over r times fewer terms are as large. Projections down choose
the features, the one up puts them back. The side network has no dropout.

No name of a weight is looked at: sizes are compared, and the whole is tried.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from lola_flwr.errors import UserError, reason_of
from lola_flwr.model.bases import LADDER, Base
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.model.example import examples_of
from lola_flwr.model.ladder import (
    Ladder,
    Reduction,
    SideLayer,
    ladder_partition,
    stand_beside,
)
from lola_flwr.model.loading import fingerprint, keep_fingerprint
from lola_flwr.model.running import divide, trace_of
from lola_flwr.model.stored_base import (
    evaluation_mode,
    quantised_modules,
    store_base,
)
from lola_flwr.randomness import rng_for

DEFAULT_FACTOR = 8

# How large what the side network adds begins: little, and not nothing, since of a
# projection of zeros no block has a gradient.
_BEGIN = 0.1

# The entries of a configuration that are sizes of its layers (others follow from them).
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "hidden_dim",
    "n_inner",
    "ffn_dim",
    "head_dim",
)
_MADE_OF = {"self", "config", "layer_idx"}


def add_ladder(
    model: Any,
    options: Mapping[str, Any],
    *,
    head: Iterable[str],
    base: Base = "fp32",
    seed: int = 0,
) -> Any:
    """Put a side network beside a model, and store the model as asked for.

    Parameters
    ----------
    model
        A model of transformers; changed in place.
    options
        ``r``, by which factor the side network is narrower (default: 8; a divisor of
        the features of a head), and ``stack``, as for `model_partition`, where it is
        not the longest stack that it is to stand beside.
    head
        Names of the model's own parameters that are trained, too.
    base
        How the frozen model is stored, as for `adapt`.
    seed
        Which features are kept is a function of it.

    Returns
    -------
    The model, in evaluation mode.

    Raises
    ------
    UserError
        An option is unknown, or the model's layers cannot be had in that size, or not
        be called as the model's own.
    """
    given = {"r": DEFAULT_FACTOR, "stack": None, **options}
    if unknown := given.keys() - {"r", "stack"}:
        raise UserError(
            f"tuning={LADDER!r} takes the options r and stack; got {min(unknown)!r}."
        )
    factor = given["r"]
    if type(factor) is not int or factor < 2:
        raise UserError(
            f"r={factor!r}: a side network is narrower than the model by a factor of 2 "
            f"or more; pass a whole number, as r={DEFAULT_FACTOR}."
        )
    reduction = Reduction(factor, int(rng_for(seed, LADDER).integers(factor)))
    return put_beside(model, reduction, given["stack"], head=head, base=base)


def put_beside(
    model: Any,
    reduction: Reduction,
    stack: str | None,
    *,
    head: Iterable[str],
    base: Base = "fp32",
) -> Any:
    """Put a side network of certain features beside a model, as `add_ladder` does."""
    _check_model(model)
    names = [name for name, _ in model.named_parameters()]
    trace = trace_of(model, None)
    paths = [_common(block) for block in divide(names, trace, stack=stack).blocks]
    layers = [model.get_submodule(path) for path in paths]
    width = model.config.hidden_size
    with torch.random.fork_rng(devices=[]):
        side = [
            SideLayer(
                _choice(width, reduction, layer),
                _smaller(model, layer, index, reduction),
                reduction,
            )
            for index, layer in enumerate(layers)
        ]
        chosen = side[0].down.weight
        up = _linear(_BEGIN * chosen.detach().T)
    _check_rotation(model, layers[0], reduction)
    stand_beside(model, Ladder(side, up, stack, tuple(head)), layers)
    partition = _tried(model)
    model.eval()
    if base != "fp32":
        _store(model, base, partition)
    return model


def _check_model(model: Any) -> None:
    is_known = hasattr(getattr(model, "config", None), "hidden_size")
    if not is_known or hasattr(model, LADDER):
        raise UserError(
            f"tuning={LADDER!r} is for models of transformers whose configuration says "
            f"hidden_size, and that have no ladder yet; got {type(model).__name__}."
        )
    if quantised := [*quantised_modules(model)]:
        raise UserError(
            f"tuning={LADDER!r} begins with weights of the model, and {quantised[0]} "
            "is quantised already; load the model in float32, and pass base='nf4' or "
            "'int8'."
        )


def _common(names: Sequence[str]) -> str:
    """Return the path of the module that holds parameters of these names."""
    parts = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return ".".join(p[0] for p in takewhile(lambda p: len({*p}) == 1, parts))


def _linear(weight: Tensor) -> nn.Linear:
    outputs, inputs = weight.shape
    made = nn.Linear(inputs, outputs, device=weight.device)
    with torch.no_grad():
        made.weight.copy_(weight)
        made.bias.zero_()
    return made


def _choice(width: int, reduction: Reduction, layer: nn.Module) -> nn.Linear:
    """Make the projection that chooses features."""
    place = next(layer.parameters()).device
    return _linear(torch.eye(width, device=place)[reduction.kept])


def _smaller(
    model: Any, layer: nn.Module, index: int, reduction: Reduction
) -> nn.Module:
    """Make a layer as one of a model, of smaller sizes, with a part of its weights."""
    kind, factor = type(layer), reduction.factor
    taken = inspect.signature(kind.__init__).parameters
    config = copy.deepcopy(model.config)
    own = dict(layer.named_parameters())
    try:
        if other := [n for n in taken if n not in _MADE_OF]:
            raise ValueError(f"it is made of {other[0]}, which is not known here")
        for name in _SIZES:
            size = getattr(config, name, None)
            if isinstance(size, int):
                if size % factor:
                    raise ValueError(f"{name}={size} is no multiple of it")
                setattr(config, name, size // factor)
        # What dropout of attention weights keeps would be most of what a step keeps.
        for name, rate in [*vars(config).items()]:
            if "drop" in name and isinstance(rate, float):
                setattr(config, name, 0.0)
        place = {"layer_idx": index} if "layer_idx" in taken else {}
        with torch.device(next(layer.parameters()).device):
            made: nn.Module = kind(config, **place).to(torch.float32)
        parts = {n: p.detach()[(reduction.kept,) * p.dim()] for n, p in own.items()}
        for name, parameter in made.named_parameters():
            if parameter.shape != parts.pop(name).shape:
                raise ValueError(f"{name} has shape {tuple(parameter.shape)}")
        if parts:
            raise ValueError(f"it has no {next(iter(parts))}")
    # What a configuration or a layer raises on sizes is of all types.
    except Exception as error:
        heads = getattr(model.config, "num_attention_heads", None)
        of_head = getattr(model.config, "head_dim", None) or (
            heads and model.config.hidden_size // heads
        )
        raise UserError(
            f"tuning={LADDER!r} with r={factor}: {kind.__name__} cannot be made that "
            f"much smaller ({reason_of(error)}); r must divide the features of a head"
            f"{f', {of_head}' if of_head else ''}."
        ) from error
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            values = own[name][(reduction.kept,) * parameter.dim()]
            scale = math.sqrt(factor) if parameter.dim() > 1 else 1.0
            parameter.copy_(scale * values)
    return made.train(layer.training)


def _check_rotation(model: Any, layer: nn.Module, reduction: Reduction) -> None:
    """Refuse positions by which features are turned in pairs that are not kept."""
    seen: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.extend(kwargs.get("position_embeddings") or ())

    if next(model.parameters()).is_meta:
        return  # whoever has the weights sees it
    handle = layer.register_forward_pre_hook(note, with_kwargs=True)
    modes = evaluation_mode(model)
    try:
        with torch.no_grad():
            for example in examples_of(model):
                model(**example)
    finally:
        handle.remove()
        for module, training in modes.items():
            module.training = training
    for turned in seen:
        # Those of a pair stand half a head apart, and have one angle.
        first, second = turned[..., reduction.kept].tensor_split(2, dim=-1)
        if first.shape != second.shape or not torch.equal(first, second):
            raise UserError(
                f"tuning={LADDER!r} with r={reduction.factor}: "
                f"{type(model).__name__} turns {turned.shape[-1]} features of a head "
                f"in pairs by their positions, and every {reduction.factor}th of them "
                "are no such pairs; choose a smaller r, or another tuning, as 'lora'."
            )


def _tried(model: Any) -> BlockPartition:
    """Divide a model, which runs it; refuse layers that cannot be called."""
    try:
        return ladder_partition(model)
    except UserError as error:
        cause = error.__cause__
        if not isinstance(cause, Exception):
            raise
        raise UserError(
            f"tuning={LADDER!r}: side layers do not run as those of "
            f"{type(model).__name__} are called ({reason_of(cause)}); use "
            "another tuning, as 'lora'."
        ) from error


def _store(model: Any, base: Base, partition: BlockPartition) -> None:
    """Store what is frozen, in place, under the fingerprint that it had."""
    has_values = not any(parameter.is_meta for parameter in model.parameters())
    digest = fingerprint(model, partition.frozen) if has_values else ""
    store_base(model, base, partition.frozen)
    if digest:
        keep_fingerprint(model, partition.frozen, digest)
        _tried(model)
