"""Adapters of ``peft`` as blocks: a block is then the adapter of one layer.

Every tuner of ``peft`` that adapts layers one by one will do: LoRA and its variants
(DoRA, PiSSA, OLoRA, ...) by options, RandLoRA, VeRA, IA3, LoHa, LoKr, OFT, BOFT and the
others by name; and those of ``own_tuners``, which peft lacks. What stands around the
layers is found as in ``blocks``: the model without its adapters is divided, and each
adapter belongs where its layer does.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from lola_flwr.errors import UserError, brief, reason_of
from lola_flwr.machine.installation import require_extra
from lola_flwr.model.adapter_blocks import base_name
from lola_flwr.model.adapters_on_base import store_under_adapters, takes_loftq
from lola_flwr.model.bases import LADDER, QUANTISED, Base
from lola_flwr.model.blocks import BlocksNotFound, partition_parameters
from lola_flwr.model.ladder_start import add_ladder
from lola_flwr.model.own_tuners import register_own_tuners
from lola_flwr.model.saved_adapters import keep_initial_values
from lola_flwr.model.stored_base import check_storable

_logger = logging.getLogger(__name__)

FULL = "full"

# peft can build these, but their training needs more than gradients of the parameters
# of layers.
_REFUSED_TUNERS = {
    "adalora": "moves ranks between layers as its own training loop goes on",
    "poly": "needs the task of every example",
    "shadow": "trains a network beside the layers",
    "trainabletokens": "trains embeddings, which stand before the layers",
    "xlora": "trains a classifier over other adapters",
}
# The one tuner whose targets are no linear maps.
_OF_NORMALISATIONS = "lntuning"

# Initialisations that more is needed for than the model.
_DATA_DRIVEN = "looks at training data, which the server does not have"
_REFUSED_INITIALISATIONS = {
    "eva": _DATA_DRIVEN,
    "corda": _DATA_DRIVEN,
    "lora_ga": _DATA_DRIVEN,
}


def adapt(
    model: nn.Module,
    tuning: str,
    options: Mapping[str, Any] | None = None,
    *,
    base: Base = "fp32",
    seed: int = 0,
) -> Any:
    """Put adapters into a model, and store the base under them as asked for.

    Parameters
    ----------
    model
        The model; changed in place.
    tuning
        ``"full"``, which returns the model as it is, or a tuner of peft by the name of
        its configuration: ``"lora"``, ``"randlora"``, ``"vera"``, ``"ia3"``, ...; or
        one of ours: ``"paca"``, ``"svfit"``, ``"lamda"``, ``"peqa"``; or ``"ladder"``,
        for a side network, with the options of `add_ladder`.
    options
        Keyword arguments of that configuration: ``{"r": 8, "use_dora": True}``. Where
        they leave it open, ``target_modules`` are those that peft knows for the type of
        model; where it knows none, or none that this model has, the linear maps of the
        layers, for LN tuning their normalisations; and ``modules_to_save``, which are
        trained in full, what a Hugging Face model has beside its pre-trained base (a
        new classifier), apart from a language model's output layer.
    base
        How the frozen base is stored: ``"fp32"``, as it was loaded; ``"bf16"``; or
        ``"nf4"`` or ``"int8"``, its linear maps in 4 or 8 bits (bitsandbytes). Adapters
        are float32. Two hosts may store one base in two ways: its fingerprint stays.
        ``init_lora_weights="loftq"`` lets LoRA begin as what 4 or 8 bits have lost.
    seed
        Seed of the adapters' initial values: a function of it, of the options and of
        the model, whatever the number of threads. (Where they come from a decomposition
        of the base weights, as PiSSA's, another kind of processor may round otherwise,
        and the fingerprints of the frozen weights tell.) The caller's random numbers
        stay as they were.

    Returns
    -------
    The model in a ``peft.PeftModel``, or itself with its side network; in evaluation
    mode.

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
        if base != "fp32":
            raise UserError(
                f"base={base!r} is for adapters, and tuning='{FULL}' trains the base "
                "itself; use tuning='lora', or base='fp32'."
            )
        return model
    check_storable(model, base)
    if tuning == LADDER:
        new_ones = tuple(f"{module}." for module in _new_modules(model))
        head = [
            name for name, _ in model.named_parameters() if name.startswith(new_ones)
        ]
        return add_ladder(model, options or {}, head=head, base=base, seed=seed)
    config_class = _config_class(tuning)
    arguments = dict(options or {})
    _refuse_options(arguments)
    begins_with_loss = takes_loftq(tuning, arguments, base)
    if base in QUANTISED:
        _refuse_tuner_of_weights(tuning, config_class, base)
    new = [] if "modules_to_save" in arguments else _new_modules(model)
    if new:
        arguments["modules_to_save"] = new
    try:
        with torch.random.fork_rng(devices=[]), _one_thread():
            torch.default_generator.manual_seed(seed)
            adapted = _inject(model, config_class, arguments)
    # What peft and torch raise where options and layers do not fit is of all types.
    except Exception as error:
        given = ", ".join(f"{key}={brief(v)}" for key, v in (options or {}).items())
        raise UserError(
            f"tuning={tuning!r} with {given or 'no options'}: {reason_of(error)}"
        ) from error
    _refuse_other_modules(adapted, new)
    keep_initial_values(adapted)
    adapted.eval()
    if base != "fp32":
        with _one_thread():
            store_under_adapters(adapted, base, loftq=begins_with_loss)
    return adapted


def _config_class(tuning: str) -> Any:
    """Find the configuration class of a tuner that adapts layers one by one."""
    require_extra("adapters", "peft", f"tuning={tuning!r}")
    from peft.mapping import (
        PEFT_TYPE_TO_CONFIG_MAPPING,
        PEFT_TYPE_TO_TUNER_MAPPING,
    )
    from peft.tuners.tuners_utils import BaseTuner

    register_own_tuners()
    classes = {_plain(kind.value): c for kind, c in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    by_layers = {
        _plain(kind.value)
        for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items()
        if issubclass(tuner, BaseTuner)
    }
    name = _plain(tuning)
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


def _refuse_tuner_of_weights(tuning: str, config_class: Any, base: Base) -> None:
    """Refuse tuners that are not made for quantised weights.

    They would compute with the codes.
    """
    package = config_class.__module__.rpartition(".")[0]
    if find_spec(f"{package}.bnb") is None:
        raise UserError(
            f"base={base!r}: tuning={tuning!r} works on the weights themselves, and "
            "not on quantised ones; use tuning='lora', or base='bf16'."
        )


def _plain(name: str) -> str:
    return re.sub("[-_]", "", name.lower()).removesuffix("config")


def _refuse_options(options: Mapping[str, Any]) -> None:
    """Refuse options with which peft builds what cannot be trained or saved here."""
    if options.get("inference_mode"):
        raise UserError(
            "inference_mode=True freezes the adapters, which are to be trained; leave "
            "it out."
        )
    if options.get("layer_replication"):
        raise UserError(
            f"layer_replication={options['layer_replication']} makes layers that share "
            "their weights, which cannot be told apart; leave it out."
        )
    initialisation = str(options.get("init_lora_weights")).lower()
    if initialisation in _REFUSED_INITIALISATIONS:
        raise UserError(
            f"init_lora_weights={initialisation!r} "
            f"{_REFUSED_INITIALISATIONS[initialisation]}; use 'pissa', 'olora', "
            "'orthogonal' or 'gaussian'."
        )


def _new_modules(model: nn.Module) -> list[str]:
    """Name what a Hugging Face model has beside its pre-trained base."""
    base = _base_modules(model)
    if not base:
        return []
    output = getattr(model, "get_output_embeddings", lambda: None)()
    return [
        name
        for name, module in model.named_children()
        if name not in base
        and not any(part is output for part in module.modules())
        and any(True for _ in module.parameters())
    ]


def _base_modules(model: Any) -> set[str]:
    """Name the modules of a Hugging Face model that are its pre-trained base.

    None of a model that is a base itself.
    """
    prefix = getattr(model, "base_model_prefix", "")
    if not prefix or hasattr(model, prefix):
        return {prefix} - {""}
    from transformers import MODEL_MAPPING

    bases = MODEL_MAPPING.get(type(model.config), ())
    if type(model) in (bases if isinstance(bases, tuple) else (bases,)):
        return set()
    # CLIP's image classifier has a part of CLIP, under that part's name.
    try:
        partition = partition_parameters(name for name, _ in model.named_parameters())
    except BlocksNotFound:
        return set()
    in_base = (*partition.frozen, *(n for block in partition.blocks for n in block))
    return {name.partition(".")[0] for name in in_base}


def _inject(model: nn.Module, config_class: Any, arguments: dict[str, Any]) -> Any:
    from peft import get_peft_model

    # peft changes lists that it is given.
    config = config_class(**copy.deepcopy(arguments))
    names = [name for name, _ in model.named_modules()]
    try:
        return get_peft_model(model, config)
    except Exception:  # what peft raises without targets is of all types
        # Where peft finds no targets, nothing has changed yet.
        changed = names != [name for name, _ in model.named_modules()]
        if changed or arguments.keys() & {"target_modules", "target_parameters"}:
            raise
        targets = _layer_targets(model, config_class)
        if not targets:
            raise
    _logger.info("peft knows no targets for this model; adapting %s", targets)
    found: dict[str, Any] = {"target_modules": targets}
    if hasattr(config, "feedforward_modules"):
        # Those whose input IA3 scales, not their output.
        found["feedforward_modules"] = []
    return get_peft_model(model, config_class(**copy.deepcopy({**found, **arguments})))


def _layer_targets(model: nn.Module, config_class: Any) -> list[str] | str:
    """Find the modules of the layers that a tuner adapts, where peft knows none."""
    of_normalisations = _plain(config_class.__name__) == _OF_NORMALISATIONS
    try:
        partition = partition_parameters(name for name, _ in model.named_parameters())
    except BlocksNotFound:
        # What the blocks are is said later.
        return [] if of_normalisations else "all-linear"
    wanted = _is_normalisation if of_normalisations else _is_linear
    holders = (name.rpartition(".")[0] for block in partition.blocks for name in block)
    return [n for n in dict.fromkeys(holders) if wanted(model.get_submodule(n))]


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))


def _is_normalisation(module: nn.Module) -> bool:
    """Tell a normalisation, of which every library has its own classes."""
    weight = getattr(module, "weight", None)
    return (
        isinstance(weight, Tensor)
        and weight.dim() == 1
        and not isinstance(module, nn.PReLU)
    )


def _refuse_other_modules(adapted: nn.Module, meant: Collection[str]) -> None:
    """Refuse modules trained in full that nobody named, and one within another.

    peft goes by the ends of names: "dense" is any "x.y.dense".
    """
    from peft.utils import ModulesToSaveWrapper

    wrappers = {
        base_name(name): module
        for name, module in adapted.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }
    for name, wrapper in wrappers.items():
        if (
            sum(isinstance(part, ModulesToSaveWrapper) for part in wrapper.modules())
            > 1
        ):
            raise UserError(
                f"modules_to_save names {name} and what is in it, which peft does not "
                "read back; name one of the two (task_type adds the classifier)."
            )
        if meant and name.partition(".")[0] not in meant:
            raise UserError(
                f"peft would train {name} in full, whose name ends as that of a new "
                f"module ({', '.join(meant)}) does; name the modules of the new one in "
                "modules_to_save, with what stands before their names."
            )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Decompose matrices alike in all processes: their last bits depend on threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
