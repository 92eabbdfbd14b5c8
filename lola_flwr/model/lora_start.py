"""LoRA that begins as what a first stage has changed of the base.

Babakniya et al., "SLoRA: Federated Parameter Efficient Fine-Tuning of Language Models",
arXiv:2308.06522: where devices' data differ, LoRA from its usual start falls behind. A
first stage trains a sparse update of the matrices; the best of LoRA's rank to what has
come of it, by singular values, is where LoRA begins, on the base as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lola_flwr.errors import UserError, reason_of
from lola_flwr.model.adapter_blocks import base_name, base_weights, is_adapted
from lola_flwr.model.head import own_names
from lola_flwr.model.saved_adapters import changes_base, tuner_name
from lola_flwr.model.stored_base import stored_values

# Singular values below this share of the largest are what rounding leaves.
_NOTHING = 1e-6


def begin_from(model: Any, directory: Path) -> str:
    """Let a model's LoRA begin as what another model has over its base, in place.

    The product of each pair of adapters becomes the best of their rank to the
    difference of the matrices; what is left of it, and whatever else differs, is
    dropped. What is trained in full (a classifier) begins as it is in the other model.

    Parameters
    ----------
    model
        A model with LoRA, of one rank or of several, which has its initial values.
    directory
        The other one: a plain model of transformers, as ``save-merged`` writes it.

    Returns
    -------
    What to tell the user: how much of the difference the adapters are.

    Raises
    ------
    UserError
        The model has other adapters; the directory holds no model of this kind, or
        one that differs in nothing that LoRA adapts.
    """
    _require_lora(model, directory)
    other = _loaded(model, directory)
    theirs = dict(other.named_parameters())
    adapters = dict(_adapters(model))
    # The files hold all of a model: one that lacks a name is of another class.
    total = kept = elsewhere = 0.0
    names = [name for name, _ in model.named_parameters()]
    with torch.no_grad():
        for name in base_weights(names):
            own = stored_values(model, name)
            change = _of_shape(theirs, base_name(name), own, directory) - own
            squares = float(change.double().square().sum())
            path = name.removesuffix(".base_layer.weight")
            if path not in adapters:
                elsewhere += squares
                continue
            total += squares
            kept += begin_with(adapters[path], change) if squares else 0.0
        if not total:
            raise UserError(
                f"start-from={str(directory)!r} has the base's own values wherever "
                "LoRA adapts it; give the model that a first stage has trained, with "
                "the target_modules of this one."
            )
        for name, parameter in _trained_in_full(model):
            values = _of_shape(theirs, name, parameter, directory)
            parameter.copy_(values)
    dropped = f"; {elsewhere / (elsewhere + total):.1%} of all, elsewhere, is left out"
    return (
        f"LoRA begins as {kept / total:.1%} of the squared change of {len(adapters)} "
        f"matrices{dropped if elsewhere else ''}"
    )


def begin_with(adapter: Any, change: Tensor) -> float:
    """Let LoRA's product be the best of its rank to a matrix; return its squared norm.

    Where the matrix is of lower rank, the rest begins as it did: a pair of zeros would
    never move.

    Parameters
    ----------
    adapter
        peft's layer.
    change
        The matrix, as the base layer holds it.
    """
    if isinstance(adapter.get_base_layer(), Conv1D):
        change = change.T
    left, sizes, right = torch.linalg.svd(change, full_matrices=False)
    first, second = adapter.lora_A["default"].weight, adapter.lora_B["default"].weight
    sizes = sizes[: len(first)]
    count = int((sizes > _NOTHING * sizes[0]).sum())
    roots = (sizes[:count] / adapter.scaling["default"]).sqrt()
    with torch.no_grad():
        first[:count] = roots[:, None] * right[:count]
        second[:, :count] = left[:, :count] * roots
        second[:, count:] = 0.0
    return float(sizes[:count].double().square().sum())


def _require_lora(model: Any, directory: Path) -> None:
    asked = f"start-from={str(directory)!r}"
    if not is_adapted(model) or tuner_name(model) != "lora":
        raise UserError(f"{asked} is where LoRA begins; use tuning='lora' with it.")
    config = model.peft_config["default"]
    if changes_base(model) or config.lora_bias:
        raise UserError(
            f"{asked} sets where plain LoRA begins, which init_lora_weights="
            f"{config.init_lora_weights!r} and lora_bias={config.lora_bias} do "
            "otherwise; leave them out."
        )
    variants = {type(v).__name__ for _, a in _adapters(model) for v in _variants(a)}
    if variants:
        raise UserError(
            f"{asked}: what adapters of {', '.join(sorted(variants))} begin as is no "
            "product of two matrices; use plain LoRA."
        )


def _variants(adapter: Any) -> list[Any]:
    return [*getattr(adapter, "lora_variant", {}).values()]


def _adapters(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Give the linear maps with LoRA, by their paths."""
    for path, module in model.named_modules():
        pairs = getattr(module, "lora_A", None)
        if not isinstance(pairs, nn.ModuleDict) or "default" not in pairs:
            continue
        # Pairs of convolutions are none of matrices.
        if isinstance(pairs["default"], nn.Linear):
            yield path, module


def _trained_in_full(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Give the parameters of copies that are trained, by the names of the originals."""
    from peft.utils import ModulesToSaveWrapper

    for path, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            copied = module.modules_to_save["default"]
            for name, parameter in copied.named_parameters():
                yield f"{base_name(path)}.{name}", parameter


def _loaded(model: Any, directory: Path) -> Any:
    """Load a plain model of the same class."""
    asked = f"start-from={str(directory)!r}"
    if (directory / "adapter_config.json").is_file():
        raise UserError(
            f"{asked} holds adapters without their base; give the directory `merged` "
            "of a run with save-merged=true."
        )
    if not (directory / "config.json").is_file():
        raise UserError(
            f"{asked} has no config.json; give the directory `merged` of a run with "
            "save-merged=true, or `model` of one that trains layers."
        )
    from lola_flwr.model.loading import quiet_transformers

    base = model.get_base_model()
    try:
        with quiet_transformers():
            other, loading = type(base).from_pretrained(
                directory,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    # A damaged file raises whatever its parser raises.
    except Exception as error:
        raise UserError(f"{asked} cannot be loaded ({reason_of(error)}).") from error
    missing = sorted(loading["missing_keys"])
    if missing:
        raise UserError(
            f"{asked} lacks {missing[0]}: it is no {type(base).__name__}; give one "
            "that was trained from this run's model."
        )
    classes, own = own_names(other.config), own_names(base.config)
    if classes != own:
        raise UserError(
            f"{asked} tells {', '.join(classes)} apart, and this run "
            f"{', '.join(own)}; give a first stage on the same task."
        )
    return other


def _of_shape(
    theirs: dict[str, nn.Parameter], name: str, own: Tensor, directory: Path
) -> Tensor:
    """Return the other model's values of a parameter, checked."""
    values = theirs.get(name)
    asked = f"start-from={str(directory)!r}"
    if values is None or values.shape != own.shape:
        found = "no such parameter" if values is None else f"{tuple(values.shape)}"
        raise UserError(
            f"{asked}: {name} is {tuple(own.shape)} here and {found} there; give a "
            "first stage of the same model."
        )
    if not values.isfinite().all():
        raise UserError(f"{asked}: {name} has values that are not finite.")
    return values.detach()
