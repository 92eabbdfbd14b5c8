"""Adapters of a pruned model as those of the whole one.

Of LoRA's product ``B A`` the rows of ``B`` go with the outputs of the matrix that it
adapts, and the columns of ``A`` with its inputs. Where these were pruned the recovered
product is zero: the whole model has its own weights there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from lola_flwr.d2ft.cuts import Cut
from lola_flwr.d2ft.maps import LayerNotUnderstood, adapters_of
from lola_flwr.errors import UserError
from lola_flwr.model.adapter_blocks import base_name
from lola_flwr.model.saved_adapters import changes_base

_LORA = ".lora_"
_TRAINED_COPY = ".modules_to_save.default"


def check_recoverable(
    model: Any, cuts: Mapping[str, Cut], options: Mapping[str, Any] | None = None
) -> None:
    """Check that what is trained of a pruned model is recovered on the whole one.

    Parameters
    ----------
    model
        The pruned model with its adapters.
    cuts
        What was left of it, by the paths that it had without adapters.
    options
        With which it was adapted: LoftQ's start shows in them alone.

    Raises
    ------
    UserError
        It has other adapters than plain LoRA, ones that have changed their base, or
        something is trained in full that was pruned.
    """
    if not cuts:
        return
    asked = (options or {}).get("init_lora_weights")
    if changes_base(model) or str(asked).lower() == "loftq":
        start = asked or model.peft_config["default"].init_lora_weights
        raise UserError(
            f"init_lora_weights={start!r} begins with what the base is without the "
            "adapters, and pruning leaves another one than they are recovered on; use "
            "'gaussian' or leave it out."
        )
    for path in cuts:
        try:
            adapters_of(model.get_base_model().get_submodule(path))
        except LayerNotUnderstood:
            raise UserError(
                f"The adapter of {path} is not of plain LoRA: what of it goes with "
                "pruned heads and neurons is not known; leave out of tuning-options "
                "what makes it another."
            ) from None
    for name, parameter in model.named_parameters():
        plain = base_name(name).replace(_TRAINED_COPY, "")
        is_cut = any(plain.startswith(f"{path}.") for path in cuts)
        if parameter.requires_grad and is_cut and _LORA not in plain:
            raise UserError(
                f"{plain} is trained in full, and pruning left a part of it; train "
                "LoRA alone there (no bias, no modules_to_save of layers)."
            )


def recovered(
    name: str, values: npt.NDArray[np.floating], cuts: Mapping[str, Cut]
) -> npt.NDArray[np.floating]:
    """Return a trained parameter of the pruned model as the whole one has it.

    Parameters
    ----------
    name
        Its name in the model with adapters.
    values
        Its values there.
    cuts
        What was left of the base.

    Returns
    -------
    The same, or with zeros for the rows of ``B`` and columns of ``A`` that went.
    """
    path, _, rest = base_name(name).partition(_LORA)
    cut = cuts.get(path)
    if cut is None:
        return values
    factor, axis = ("B", 0) if cut.side == "outputs" else ("A", 1)
    if rest.partition(".")[0] != factor:
        return values
    shape = list(values.shape)
    shape[axis] = cut.width
    whole = np.zeros(shape, values.dtype)
    whole[(slice(None),) * axis + (cut.kept,)] = values
    return whole
