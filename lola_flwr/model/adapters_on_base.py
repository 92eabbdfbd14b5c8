"""Adapters on a base stored in fewer bits: LoftQ's start, and the fingerprint."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lola_flwr.errors import UserError, reason_of
from lola_flwr.model.adapter_blocks import base_weights, frozen_names
from lola_flwr.model.bases import QUANTISED, Base
from lola_flwr.model.example import examples_of
from lola_flwr.model.inputs import failure_of
from lola_flwr.model.loading import fingerprint, keep_fingerprint
from lola_flwr.model.lora_start import begin_with
from lola_flwr.model.stored_base import store_base

_BITS = {"nf4": 4, "int8": 8}


def takes_loftq(tuning: str, options: dict[str, Any], base: Base) -> bool:
    """Tell whether LoRA is to begin as LoftQ has it, and take that out of the options.

    LoftQ's first step leaves the base as it is rounded, ``Q(W)``, and lets the adapters
    begin with the best of low rank that is lost, ``W - Q(W)``. Further ones round
    another base, which nobody else has. peft's own needs a GPU, and does not look at
    the adapters' scale.

    Raises
    ------
    UserError
        There is nothing lost, or not one step is asked for.
    """
    if str(options.get("init_lora_weights")).lower() != "loftq":
        return False
    given = dict(options.pop("loftq_config", None) or {})
    bits, steps = given.pop("loftq_bits", _BITS.get(base)), given.pop("loftq_iter", 1)
    if tuning.lower() != "lora" or base not in QUANTISED:
        raise UserError(
            "init_lora_weights='loftq' makes up for what a quantised base has lost; "
            "use it with tuning='lora' and base='nf4' or 'int8'."
        )
    if bits != _BITS[base] or steps != 1 or given:
        raise UserError(
            f"loftq_config: base={base!r} has {_BITS[base]} bits, and more steps than "
            "one would round another base than adapters are loaded on; leave it out."
        )
    options["init_lora_weights"] = True
    return True


def store_under_adapters(model: Any, base: Base, *, loftq: bool = False) -> None:
    """Store the base under a model's adapters, in place, with the fingerprint it had.

    Parameters
    ----------
    model
        The model, adapters and all.
    base
        How to store it.
    loftq
        Whether LoRA begins with what the base loses.
    """
    frozen = frozen_names(model)
    has_values = not any(parameter.is_meta for parameter in model.parameters())
    # Of what adapters were made from and on.
    digest = fingerprint(model, frozen) if has_values else ""

    def begin_with_loss(path: str, weight: Tensor, stored: Tensor) -> None:
        adapter = model.get_submodule(path.removesuffix(".base_layer"))
        if path.endswith(".base_layer") and hasattr(adapter, "lora_A"):
            begin_with(adapter, weight - stored)

    names = [n for n, p in model.named_parameters() if not p.requires_grad]
    store_base(model, base, base_weights(names), begin_with_loss if loftq else None)
    if digest:
        keep_fingerprint(model, frozen, digest)
        _try_to_run(model, base)


def _try_to_run(model: Any, base: Base) -> None:
    """Refuse adapters that do not run on a base so stored, if an example is known."""
    for example in examples_of(model):
        # What peft does to 8 bits in a first call is met in the second.
        for _ in range(2):
            failure = failure_of(model, example)
            if failure is not None:
                wider = "" if base == "bf16" else "'bf16' or "
                raise UserError(
                    f"base={base!r}: adapters with these options do not run on it "
                    f"({reason_of(failure)}); use others, or base={wider}'fp32'."
                )
