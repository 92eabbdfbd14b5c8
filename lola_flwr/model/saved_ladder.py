"""A trained side network as a directory: what it is, for which model, and its values.

``ladder.json`` says which model it stands beside, by name and by the digest of its
weights, and how; ``ladder.safetensors`` holds what was trained, the model's own head
included. The model itself is not in it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lola_flwr.errors import UserError, reason_of
from lola_flwr.machine.files import filling, replacing
from lola_flwr.model.bases import LADDER, Base
from lola_flwr.model.head import own_names
from lola_flwr.model.ladder import Reduction, ladder_of
from lola_flwr.model.ladder_start import put_beside
from lola_flwr.model.loading import fingerprint

_ABOUT, _VALUES = f"{LADDER}.json", f"{LADDER}.safetensors"
_FORMAT = 1


def save_ladder(model: Any, directory: Path) -> None:
    """Save a model's side network, and what is trained of its head.

    Parameters
    ----------
    model
        The model.
    directory
        Where to; it is made.

    Raises
    ------
    UserError
        The directory cannot be written.
    """
    ladder = ladder_of(model)
    names = _trained(model)
    config = model.config
    parameters = dict(model.named_parameters())
    about = {
        "format": _FORMAT,
        "base": str(getattr(config, "_name_or_path", "")),
        "base_fingerprint": fingerprint(
            model, [name for name in parameters if name not in names]
        ),
        "r": ladder.reduction.factor,
        "offset": ladder.reduction.offset,
        "stack": ladder.stack,
        "classes": list(own_names(config)),
    }
    values = {name: parameters[name].detach().cpu().contiguous() for name in names}
    with filling(directory):
        directory.mkdir(parents=True, exist_ok=True)
        with replacing(directory / _VALUES) as unfinished:
            save_file(values, unfinished, {"format": "pt"})
        with replacing(directory / _ABOUT) as unfinished:
            unfinished.write_text(json.dumps(about, indent=1), encoding="utf-8")


def load_ladder(model: Any, directory: Path, *, base: Base = "fp32") -> Any:
    """Put a saved side network beside the model that it was trained beside.

    A model that is refused stays as it is, unless the directory is damaged.

    Parameters
    ----------
    model
        That model, as it was before `adapt`, with a head for as many classes; changed
        in place.
    directory
        What `save_ladder` has written.
    base
        How to store the frozen model, as for `adapt`.

    Returns
    -------
    The model with its trained values, in evaluation mode.

    Raises
    ------
    UserError
        The directory holds no side network, or one for another model.
    """
    try:
        about = json.loads((directory / _ABOUT).read_text(encoding="utf-8"))
        values = load_file(directory / _VALUES)
        if about["format"] != _FORMAT:
            raise ValueError(f"it is of format {about['format']}, not {_FORMAT}")
        reduction = Reduction(int(about["r"]), int(about["offset"]))
        if not 0 <= reduction.offset < reduction.factor:
            raise ValueError(f"its offset, {reduction.offset}, is not below its r")
        stack = None if about["stack"] is None else str(about["stack"])
        wanted, named = about["base_fingerprint"], about["base"]
        classes = list(about["classes"])
    # What a damaged file raises is of several types.
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(
            f"{directory} holds no side network that can be read ({reason_of(error)}); "
            f"pass a directory with {_ABOUT} and {_VALUES}, as save_model writes it."
        ) from error
    own = dict(model.named_parameters())
    head = [name for name in values if not name.startswith(f"{LADDER}.")]
    unlike = [n for n in head if n not in own or own[n].shape != values[n].shape]
    if unlike:
        raise UserError(
            f"{directory}: {unlike[0]}, {tuple(values[unlike[0]].shape)}, is none of "
            f"{type(model).__name__} as it was loaded; load {named or 'the model'} "
            f"with num_labels={len(classes)}."
        )
    found = fingerprint(model, [name for name in own if name not in head])
    if found != wanted:
        raise UserError(
            f"{directory} stands beside another model ({named or 'unnamed'}, weights "
            f"{wanted[:12]}) than was passed (weights {found[:12]}); pass that one."
        )
    put_beside(model, reduction, stack, head=[n for n in own if n in head], base=base)
    parameters = dict(model.named_parameters())
    if {*values} != {*_trained(model)} or any(
        parameters[name].shape != value.shape for name, value in values.items()
    ):
        raise UserError(
            f"{directory / _VALUES} has other values than {_ABOUT} beside it says; "
            "save the model anew."
        )
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)
    model.config.id2label = dict(enumerate(classes))
    model.config.label2id = {name: index for index, name in enumerate(classes)}
    return model.eval()


def _trained(model: Any) -> tuple[str, ...]:
    inside = [n for n, _ in model.named_parameters() if n.startswith(f"{LADDER}.")]
    return (*inside, *ladder_of(model).head)
