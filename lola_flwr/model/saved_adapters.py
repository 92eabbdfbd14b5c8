"""Trained adapters of ``peft``: saved, read back, merged into what they adapt."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lola_flwr.errors import UserError, reason_of
from lola_flwr.machine.files import filling
from lola_flwr.model.adapter_blocks import base_name, base_weights, is_adapted
from lola_flwr.model.head import are_named, own_names
from lola_flwr.model.ladder import is_ladder
from lola_flwr.model.own_tuners import OWN_TUNERS
from lola_flwr.model.saved_ladder import save_ladder
from lola_flwr.model.stored_base import in_full_precision, stored_as, stored_values

SAVED_BASE = "base"
"""Directory beside adapters with the base that they are for, where there is one."""

# These take the adapter's initial value out of the base weights.
_BASE_CHANGING = ("pissa", "olora")

# Initial values of adapters under such an initialisation, for the conversion to LoRA.
_initial_values: WeakKeyDictionary[nn.Module, dict[str, Tensor]] = WeakKeyDictionary()


def tuner_name(model: Any) -> str:
    """Return the name of the tuner that a model has adapters of."""
    return str(model.peft_config["default"].peft_type.value.lower())


def is_saved_merged(model: Any) -> bool:
    """Tell whether ``save_model`` saves a model without adapters.

    That is where they are tuners of ours: nobody else's peft could read them.
    """
    return is_adapted(model) and tuner_name(model) in OWN_TUNERS


def changes_base(model: Any) -> bool:
    """Tell whether the adapters' initialisation changed the base weights."""
    config = model.peft_config["default"]
    initialisation = str(getattr(config, "init_lora_weights", "")).lower()
    return initialisation.startswith(_BASE_CHANGING)


def keep_initial_values(model: Any) -> None:
    """Keep what ``save_model`` needs, if the initialisation changed the base weights.

    Parameters
    ----------
    model
        A model whose adapters have their initial values.
    """
    if changes_base(model):
        _initial_values[model] = _adapter_values(model)


def save_model(model: Any, directory: Path) -> None:
    """Save a model: adapters as a directory that ``PeftModel.from_pretrained`` loads.

    Where the tuner is one of ours the directory is that of a plain Hugging Face model,
    the adapters' effect in its weights; for a moment there are two of it in memory.

    Where the initialisation changed the base weights (PiSSA, OLoRA), the adapters are
    saved as plain LoRA of twice the rank, for the base as it was: the base is now
    ``W - s B0 A0``, so that the model's ``W - s B0 A0 + s B A`` is ``W`` with the
    adapter ``s [B, -B0] [A; A0]``. Where that base was then stored in fewer bits, no
    adapter of low rank makes up for its rounding: it is saved, too, in float32 under
    ``base``, and the adapters are for it, however it is loaded: what it was stored in
    gives the same values again.

    A side network is saved for `load_ladder`, of ``lola_flwr.model.saved_ladder``.

    Raises
    ------
    UserError
        The initialisation changed the base weights of this model, or of the one that it
        is a copy of, and its initial values are not known; the directory cannot be
        written; or the model is merged, and is none of transformers.
    """
    if is_ladder(model):
        save_ladder(model, directory)
        return
    if is_saved_merged(model):
        require_save_pretrained(model)
        with filling(directory):
            merge(unstored_copy(model)).save_pretrained(directory)
        return
    initial = _initial_values.get(model)
    if initial is None and is_adapted(model) and changes_base(model):
        raise UserError(
            "The initialisation "
            f"{model.peft_config['default'].init_lora_weights!r} changed the base "
            "weights, and this copy of the model does not know how; save the model "
            "that adapt() returned."
        )
    with filling(directory):
        model.save_pretrained(directory)
        if initial is None:
            return
        if stored_as(model) == "fp32":
            _save_for_base_as_it_was(model, initial, directory)
        else:
            _save_with_base(model, directory)


def keep_class_names(model: Any, directory: Path) -> str:
    """Keep the names of a classifier's classes beside its saved adapters.

    Who loads adapters has the names from their base, as it is stored. Where that one
    has other classes (whose head the adapters replace), transformers would call the
    adapters' by them without a word; beside a configuration it wants all of a model.

    Parameters
    ----------
    model
        The model.
    directory
        Where ``save_model`` has saved it.

    Returns
    -------
    What to tell the user; "" where the base's own classes are these.
    """
    if not is_adapted(model) or is_saved_merged(model):
        return ""
    stored = model.peft_config["default"].base_model_name_or_path
    if not stored:
        return ""
    from transformers import AutoConfig

    config = model.get_base_model().config
    own, names = (
        own_names(AutoConfig.from_pretrained(stored, trust_remote_code=False)),
        own_names(config),
    )
    if own == names or (len(own) == len(names) and not are_named(own)):
        return ""
    with filling(directory):
        config.save_pretrained(directory)
    return (
        f"{stored} by itself has other classes ({', '.join(own)}) than these adapters "
        f"({', '.join(names)}): load it with config=AutoConfig.from_pretrained("
        f"{str(directory)!r}), ignore_mismatched_sizes=True, and them with PeftModel"
    )


def _save_with_base(model: Any, directory: Path) -> None:
    """Save the base that adapters are for beside them."""
    from safetensors.torch import save_file

    names = [name for name, _ in model.named_parameters()]
    values = {
        base_name(name): stored_values(model, name).cpu().contiguous()
        for name in base_weights(names, replaced=True)
    }
    base = directory / SAVED_BASE
    base.mkdir(exist_ok=True)
    save_file(values, base / "model.safetensors", {"format": "pt"})
    inner = model.get_base_model()
    config = copy.deepcopy(inner.config)
    config.architectures = [type(inner).__name__]
    config.dtype = torch.float32
    config.save_pretrained(base)
    adapter = copy.deepcopy(model.peft_config["default"])
    adapter.base_model_name_or_path = str(base.absolute())
    # They are not begun anew when they are loaded.
    adapter.init_lora_weights = True
    adapter.inference_mode = True
    adapter.save_pretrained(directory)


def _save_for_base_as_it_was(
    model: Any, initial: Mapping[str, Tensor], directory: Path
) -> None:
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


def require_save_pretrained(model: Any) -> None:
    """Refuse a model that would be saved merged, and cannot be saved so."""
    if not hasattr(model.get_base_model(), "save_pretrained"):
        raise UserError(
            f"Adapters of tuning={tuner_name(model)!r} are saved as a merged model, "
            f"and {type(model.get_base_model()).__name__} has no save_pretrained; save "
            "merge(model).state_dict()."
        )


def unstored_copy(model: Any) -> Any:
    """Return a copy of a model, with the values that it has in full precision."""
    return in_full_precision(copy.deepcopy(model), stored_as(model))


def merge(model: Any) -> Any:
    """Return the model without adapters, their effect in its weights.

    The given model is used up.

    Raises
    ------
    UserError
        The tuner cannot be merged.
    """
    if is_ladder(model):
        raise UserError(
            "A side network (tuning='ladder') cannot be merged into the model that it "
            "stands beside; save it as it is (save-model=true)."
        )
    if not is_adapted(model):
        return model
    kind = tuner_name(model)
    in_full_precision(model)
    try:
        _unwrap_trained_modules(model)
        merged = model.merge_and_unload()
        left = [
            name for name, _ in merged.named_parameters() if base_name(name) != name
        ]
        if left:
            raise ValueError(f"peft leaves {left[0]}")
    # What peft raises where it cannot is of all types.
    except Exception as error:
        raise UserError(
            f"Adapters of tuning={kind!r} cannot be merged into the base "
            f"({reason_of(error)}); save them as adapters."
        ) from error
    return merged


def _unwrap_trained_modules(model: nn.Module) -> None:
    """Put modules that are trained in full where they belong.

    Most tuners of peft merge no module that has others in it, and one of them none.
    """
    from peft.utils import ModulesToSaveWrapper

    wrappers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }
    for name, wrapper in wrappers.items():
        parent, _, child = name.rpartition(".")
        trained = wrapper.modules_to_save["default"]
        setattr(model.get_submodule(parent), child, trained)


def _adapter_values(model: nn.Module) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    return {
        name: values.detach().clone().contiguous()
        for name, values in get_peft_model_state_dict(model).items()
    }
