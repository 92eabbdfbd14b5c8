"""Adapters of ``peft`` as blocks: a block is then the adapter of one layer.

Every tuner of ``peft`` that adapts layers one by one will do: LoRA and its variants
(DoRA, PiSSA, OLoRA, ...) by options, RandLoRA, VeRA, IA3, LoHa, LoKr, OFT, BOFT and the
others by name. What stands around the layers is found as in ``blocks``: the model
without its adapters is divided, and each adapter belongs where its layer does.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lola_flwr.errors import UserError
from lola_flwr.model.adapter_blocks import WRAPPED, is_adapted

FULL = "full"

# peft can build these, but their training needs more than gradients of parameters.
_REFUSED_TUNERS = {
    "adalora": "moves ranks between layers as its own training loop goes on",
    "poly": "needs the task of every example",
    "xlora": "trains a classifier over other adapters",
}
_DATA_DRIVEN = ("eva", "corda", "lora_ga")
# These take the adapter's initial value out of the base weights.
_BASE_CHANGING = ("pissa", "olora")

# Initial values of adapters under such an initialisation, for the conversion to LoRA.
_initial_values: WeakKeyDictionary[nn.Module, dict[str, Tensor]] = WeakKeyDictionary()


def adapt(
    model: nn.Module,
    tuning: str,
    options: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
) -> Any:
    """Put adapters into a model.

    Parameters
    ----------
    model
        The model; changed in place.
    tuning
        ``"full"``, which returns the model as it is, or a tuner of peft by the name of
        its configuration: ``"lora"``, ``"randlora"``, ``"vera"``, ``"ia3"``, ...
    options
        Keyword arguments of that configuration: ``{"r": 8, "use_dora": True}``. Where
        they leave it open, ``target_modules`` are those that peft knows for the type of
        model, else all linear layers; and ``modules_to_save``, which are trained in
        full, what a Hugging Face model has beside its pre-trained base (a new
        classifier), apart from a language model's output layer.
    seed
        Seed of the adapters' initial values: a function of it, of the options and of
        the model, whatever the number of threads. (Where they come from a decomposition
        of the base weights, as PiSSA's, another kind of processor may round otherwise,
        and the fingerprints of the frozen weights tell.) The caller's random numbers
        stay as they were.

    Returns
    -------
    The model in a ``peft.PeftModel``, in evaluation mode.

    Raises
    ------
    UserError
        peft is not installed, has no such tuner, or refuses its options; or the tuner
        does not adapt layers one by one.
    """
    if tuning == FULL:
        if options:
            raise UserError(
                f"tuning='{FULL}' takes no options; got {', '.join(options)}."
            )
        return model
    config_class = _config_class(tuning)
    arguments = dict(options or {})
    fields = {field.name for field in dataclasses.fields(config_class)}
    if "modules_to_save" in fields:
        arguments.setdefault("modules_to_save", _new_modules(model) or None)
    initialisation = str(arguments.get("init_lora_weights")).lower()
    if initialisation in _DATA_DRIVEN:
        raise UserError(
            f"init_lora_weights={initialisation!r} looks at training data, which the "
            "server does not have; use 'pissa', 'olora', 'orthogonal' or 'gaussian'."
        )
    try:
        with torch.random.fork_rng(devices=[]), _one_thread():
            torch.default_generator.manual_seed(seed)
            adapted = _inject(model, config_class, arguments)
    # What peft and torch raise where options and layers do not fit is of all types.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"tuning={tuning!r}: {reason}") from error
    if initialisation.startswith(_BASE_CHANGING):
        _initial_values[adapted] = _adapter_values(adapted)
    return adapted.eval()


def save_model(model: Any, directory: Path) -> None:
    """Save a model: adapters as a directory that ``PeftModel.from_pretrained`` loads.

    Where the initialisation changed the base weights (PiSSA, OLoRA), the adapters are
    saved as plain LoRA of twice the rank, for the base as it was: the base is now
    ``W - s B0 A0``, so that the model's ``W - s B0 A0 + s B A`` is ``W`` with the
    adapter ``s [B, -B0] [A; A0]``.
    """
    model.save_pretrained(directory)
    initial = _initial_values.get(model)
    if initial is None:
        return
    from safetensors.torch import save_file

    values = _adapter_values(model)
    for name, start in initial.items():
        if name.endswith(".lora_A.weight"):
            values[name] = torch.cat([values[name], start])  # [2r, inputs]
        elif name.endswith(".lora_B.weight"):
            values[name] = torch.cat([values[name], -start], dim=1)  # [outputs, 2r]
    save_file(values, directory / "adapter_model.safetensors", {"format": "pt"})
    config = copy.deepcopy(model.peft_config["default"])
    # The scale s is alpha / r, or alpha / sqrt(r).
    factor = math.sqrt(2) if config.use_rslora else 2
    config.r, config.lora_alpha = 2 * config.r, factor * config.lora_alpha
    config.rank_pattern = {n: 2 * r for n, r in config.rank_pattern.items()}
    config.alpha_pattern = {n: factor * a for n, a in config.alpha_pattern.items()}
    config.init_lora_weights = True
    config.inference_mode = True
    config.save_pretrained(directory)


def merge(model: Any) -> Any:
    """Return the model without adapters, their effect in its weights.

    The given model is used up.

    Raises
    ------
    UserError
        The tuner cannot be merged.
    """
    if not is_adapted(model):
        return model
    kind = model.peft_config["default"].peft_type.value.lower()
    try:
        merged = model.merge_and_unload()
        left = next((n for n, _ in merged.named_parameters() if WRAPPED.search(n)), "")
        if left:
            raise ValueError(f"peft leaves {left}")
    except (NotImplementedError, AttributeError, ValueError) as error:
        raise UserError(
            f"Adapters of tuning={kind!r} cannot be merged into the base ({error}); "
            "save them as adapters."
        ) from error
    return merged


def _config_class(tuning: str) -> Any:
    """Find the configuration class of a tuner that adapts layers one by one."""
    if find_spec("peft") is None:
        raise UserError(
            f"tuning={tuning!r} needs peft: pip install 'lola-flwr[adapters]', or use "
            f"tuning='{FULL}'."
        )
    from peft.mapping import (
        PEFT_TYPE_TO_CONFIG_MAPPING,
        PEFT_TYPE_TO_TUNER_MAPPING,
    )
    from peft.tuners.tuners_utils import BaseTuner

    def plain(name: str) -> str:
        return re.sub("[-_]", "", name.lower()).removesuffix("config")

    classes = {plain(kind.value): c for kind, c in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    by_layers = {
        plain(kind.value)
        for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items()
        if issubclass(tuner, BaseTuner)
    }
    name = plain(tuning)
    usable = sorted(by_layers - _REFUSED_TUNERS.keys())
    if name not in classes:
        raise UserError(
            f"tuning={tuning!r} is neither '{FULL}' nor a tuner of peft; choose from "
            f"{', '.join(usable)}."
        )
    if name not in usable:
        why = _REFUSED_TUNERS.get(name, "does not adapt layers one by one")
        raise UserError(
            f"tuning={tuning!r} {why}, so it cannot be divided into blocks; use 'lora' "
            "or another tuner of linear layers."
        )
    return classes[name]


def _new_modules(model: nn.Module) -> list[str]:
    """Name what a Hugging Face model has beside its pre-trained base.

    By the modules that hold the weights: peft can merge most tuners only so.
    """
    base = getattr(model, "base_model_prefix", "")
    if not base or not hasattr(model, base):
        return []
    output = getattr(model, "get_output_embeddings", lambda: None)()
    return [
        f"{name}.{inner}" if inner else name
        for name, module in model.named_children()
        if name != base and not any(part is output for part in module.modules())
        for inner, part in module.named_modules()
        if any(True for _ in part.parameters(recurse=False))
    ]


def _inject(model: nn.Module, config_class: Any, arguments: dict[str, Any]) -> Any:
    from peft import get_peft_model

    try:
        return get_peft_model(model, config_class(**arguments))
    except ValueError as error:
        # peft knows no targets for this type of model; nothing has changed yet.
        if "specify `target_modules`" not in str(error):
            raise
    arguments = {**arguments, "target_modules": "all-linear"}
    return get_peft_model(model, config_class(**arguments))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Decompose matrices alike in all processes: their last bits depend on threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _adapter_values(model: nn.Module) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    return {
        name: values.detach().clone().contiguous()
        for name, values in get_peft_model_state_dict(model).items()
    }
