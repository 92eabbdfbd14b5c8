"""How the frozen base under adapters is stored: in float32, in half, in 4 or 8 bits.

bitsandbytes is never imported for a model that it has not quantised: its layers are
told by what they have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lola_flwr.errors import UserError
from lola_flwr.machine.installation import require_extra
from lola_flwr.model.bases import BASES, QUANTISED, Base

_HALF = (torch.float16, torch.bfloat16)

# Takes a module's path, its weight before, and what it became.
OnRounded = Callable[[str, Tensor, Tensor], None]

# How the models were stored that `store_base` has stored.
_stored_as: WeakKeyDictionary[nn.Module, Base] = WeakKeyDictionary()


def stored_as(model: nn.Module) -> Base:
    """Return how `store_base` has stored a model's base; else "fp32"."""
    return _stored_as.get(model, "fp32")


def is_quantised(module: nn.Module) -> bool:
    """Tell whether a module is a linear map of bitsandbytes, 4 bits or 8."""
    # Its own: peft's layers show that of the one inside.
    weight = module._parameters.get("weight")
    return hasattr(weight, "quant_state") or hasattr(weight, "SCB")


def quantised_modules(model: nn.Module) -> dict[str, Any]:
    """Return a model's quantised linear maps by their paths."""
    return {n: m for n, m in model.named_modules() if is_quantised(m)}


def check_storable(model: nn.Module, base: str) -> None:
    """Check that a model's base can be stored as asked for.

    Raises
    ------
    UserError
        There is no such way, the base is quantised already, it has no values yet, or
        bitsandbytes is not installed.
    """
    if base not in BASES:
        raise UserError(f"base={base!r} is unknown; choose from {', '.join(BASES)}.")
    if base == "fp32":
        return
    if quantised_modules(model):
        raise UserError(
            f"base={base!r}: the model is quantised already, and would be a second "
            "time; leave base at 'fp32', which takes it as it is, or load a model that "
            "is not."
        )
    if base not in QUANTISED:
        return
    require_extra("quantised", "bitsandbytes", f"base={base!r}")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UserError(
            f"base={base!r}: a model without values cannot be quantised, and a "
            "quantised base not be streamed from a disk; load the model, or use "
            "base='bf16'."
        )


def store_base(
    model: nn.Module,
    base: Base,
    names: Iterable[str],
    on_rounded: OnRounded | None = None,
) -> None:
    """Store a model's frozen base in fewer bits, in place.

    Parameters
    ----------
    model
        The model, all of whose weights of ``names`` are frozen.
    base
        ``"fp32"`` leaves it as it is. ``"bf16"``: all of these weights in bfloat16.
        ``"nf4"``, ``"int8"``: the weights of linear maps, but of the output layer, as
        bitsandbytes and transformers do; the others stay in float32.
    names
        Names of the base's weights.
    on_rounded
        Is told what became of each weight of a linear map.

    Raises
    ------
    UserError
        There is nothing that could be quantised.
    """
    if base == "fp32":
        return
    if base == "bf16":
        parameters = dict(model.named_parameters())
        for name in names:
            if parameters[name].is_floating_point():
                parameters[name].data = parameters[name].data.to(torch.bfloat16)
    else:
        paths = [*_linear_maps(model, names)]
        if not paths:
            raise UserError(
                f"base={base!r}: {type(model).__name__} has no linear maps (nn.Linear) "
                "beside its output layer that could be quantised; use base='bf16'."
            )
        for path in paths:
            linear = model.get_submodule(path)
            assert isinstance(linear, nn.Linear)
            stored = _quantised(linear, base)
            if on_rounded is not None:
                on_rounded(path, linear.weight.detach(), weight_of(stored))
            model.set_submodule(path, stored)
    let_trained_take_half(model)
    keep_differentiable(model)
    _stored_as[model] = base


def _linear_maps(model: nn.Module, names: Iterable[str]) -> Iterator[str]:
    """Give the paths of a base's linear maps, but for output layers."""
    base: Any = model
    if hasattr(model, "peft_config"):
        base = base.get_base_model()
    output = getattr(base, "get_output_embeddings", lambda: None)()
    tied = getattr(base, "get_input_embeddings", lambda: None)()
    kept = {id(getattr(module, "weight", None)) for module in (output, tied)}
    for name in names:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        is_linear = leaf == "weight" and type(module) is nn.Linear
        if is_linear and not {id(module.weight)} & kept:
            yield path


def _quantised(linear: nn.Linear, base: Base) -> Any:
    from bitsandbytes import nn as layers

    sizes = (linear.in_features, linear.out_features, linear.bias is not None)
    made: Any = layers
    if base == "nf4":
        # Scales that are quantised, too, would save little and round once more.
        stored = made.Linear4bit(
            *sizes,
            compute_dtype=torch.float32,
            compress_statistics=False,
            quant_type="nf4",
        )
    else:
        stored = made.Linear8bitLt(*sizes, has_fp16_weights=False)
    stored.load_state_dict(linear.state_dict())
    stored.requires_grad_(False)
    return stored.to(linear.weight.device).train(linear.training)


def in_full_precision(model: nn.Module, was: Base | None = None) -> nn.Module:
    """Store a model's base in float32 again, with the values that it has; in place.

    Parameters
    ----------
    model
        The model.
    was
        How it was stored, where the model is a copy of what `store_base` was given.
    """
    for path, stored in quantised_modules(model).items():
        with torch.device("meta"):
            plain = nn.Linear(
                stored.in_features, stored.out_features, stored.bias is not None
            )
        plain.weight = nn.Parameter(weight_of(stored), requires_grad=False)
        if stored.bias is not None:
            plain.bias = stored.bias
        model.set_submodule(path, plain.train(stored.training))
    if (was or stored_as(model)) == "bf16":
        for parameter in model.parameters():
            parameter.data = in_full(parameter.data)
    _stored_as.pop(model, None)
    return model


def weight_of(stored: Any) -> Tensor:
    """Return the weight that a quantised linear map computes with, in float32."""
    import bitsandbytes.functional as functional

    weight = stored.weight
    if hasattr(weight, "quant_state"):
        values: Tensor = functional.dequantize_4bit(weight.data, weight.quant_state)
        return values.to(torch.float32)
    codes: Tensor = weight.data
    scales = _scales(stored).to(torch.float32)
    return codes.to(torch.float32) * (scales[:, None] / 127)


def _scales(stored: Any) -> Tensor:
    """Return the scales of 8 bits, which move when the module is first called."""
    own: Tensor | None = stored.weight.SCB
    scales: Tensor = stored.state.SCB if own is None else own
    return scales


def stored_parts(model: nn.Module, name: str) -> list[Tensor]:
    """Return the tensors that one of a model's weights is stored in."""
    path, _, leaf = name.rpartition(".")
    module: Any = model.get_submodule(path)
    values: Tensor = getattr(module, leaf)
    if leaf != "weight" or not is_quantised(module):
        return [values]
    if not hasattr(values, "quant_state"):
        return [values.detach(), _scales(module)]
    state = values.quant_state
    nested = [state.state2.absmax, state.offset] if state.nested else []
    return [values.detach(), state.absmax, *nested]


def stored_values(model: nn.Module, name: str) -> Tensor:
    """Return a parameter's or buffer's values; half types and codes in float32."""
    path, _, leaf = name.rpartition(".")
    module: Any = model.get_submodule(path)
    if leaf == "weight" and is_quantised(module):
        return weight_of(module)
    host: Any = model.get_submodule(path.removesuffix(".base_layer"))
    if leaf == "weight" and hasattr(host, "codes_stand_for"):
        return in_full(host.codes_stand_for())
    values: Tensor = getattr(module, leaf).detach()
    return in_full(values)


def in_full(values: Tensor) -> Tensor:
    """Return values of a half type in float32, and others as they are."""
    return values.to(torch.float32) if values.dtype in _HALF else values


def keep_differentiable(model: nn.Module) -> None:
    """Let 4-bit layers keep the layout that gradients are computed with.

    On CPUs with bfloat16 instructions bitsandbytes 0.50 repacks a layer in its first
    forward pass in evaluation mode, for good, and what it computes with from then on
    has no gradient, in training mode either. And it misreads on any CPU the scales of
    rows that are not whole blocks.

    Raises
    ------
    UserError
        A layer was repacked before, or has rows of that kind.
    """
    for path, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        layer: Any = module
        layer.support_avx512bf16_for_cpu = False
        state = getattr(layer.weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise UserError(
                f"bitsandbytes has repacked {path} for inference, after which it has "
                "no gradients: load the model anew, and adapt it before it is run."
            )
        if state is not None and layer.weight.device.type == "cpu":
            _refuse_broken_blocks(path, layer.in_features, state.blocksize)


def _refuse_broken_blocks(path: str, width: int, blocksize: int) -> None:
    if width % blocksize:
        raise UserError(
            f"{path} reads {width} features, no multiple of {blocksize}: on a CPU "
            "bitsandbytes misreads the scales of 4-bit weights then; use base='int8' "
            "or 'bf16'."
        )


def evaluation_mode(model: nn.Module) -> Mapping[nn.Module, bool]:
    """Let a model compute without dropout, and otherwise as in training.

    By themselves 8-bit layers round in evaluation what goes into them, too.

    Returns
    -------
    The mode that each module was in.
    """
    keep_differentiable(model)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    for module in quantised_modules(model).values():
        module.training = True
    return modes


def let_trained_take_half(model: nn.Module) -> None:
    """Let what is trained in full, in float32, take hidden states of a half base, too.

    Layers of peft see to that themselves.
    """
    for module in model.modules():
        own = [*module.parameters(recurse=False)]
        is_trained = any(p.requires_grad and p.dtype == torch.float32 for p in own)
        if is_trained and type(module).__module__.partition(".")[0] != "peft":
            module.register_forward_pre_hook(_in_float32)


def _in_float32(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(in_full(a) if isinstance(a, Tensor) else a for a in args)
