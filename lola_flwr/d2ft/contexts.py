"""What layers are told of tokens: which of them there are, and which see which.

Of most encoders a mask of the tokens says it all. Where a layer looks back only, or
turns queries and keys by positions, whoever computes a part of it has the model itself
say what it is told, by running what is before the layers on stand-ins for the tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lola_flwr.d2ft.branches import Context
from lola_flwr.d2ft.execution import replaced_layers
from lola_flwr.d2ft.subnetworks import LayerNotUnderstood, Subnetworks
from lola_flwr.model.example import token_ids


class _Reached(Exception):
    """The model has come to the layer that was waited for."""


def layer_inputs(
    subnetworks: Subnetworks, run: Callable[[], object], *, num_layers: int
) -> tuple[Tensor, list[Context]]:
    """Return what the first layer is given, and what some layers are told.

    Parameters
    ----------
    subnetworks
        The model's sub-networks.
    run
        Runs the model, which does not come further than these layers.
    num_layers
        How many layers, from the first on.

    Raises
    ------
    LayerNotUnderstood
        The model does not call its layers one after the other.
    """
    hidden: list[Tensor] = []
    told: list[Context] = []

    def note(index: int, x: Tensor, context: Context) -> Tensor:
        if index != len(told):
            raise LayerNotUnderstood(
                f"The model calls its layer {index} after {len(told)} others; only "
                "layers that follow each other can be spread over devices."
            )
        hidden.append(x)
        told.append(context)
        if len(told) == num_layers:
            raise _Reached
        return x

    functions = {
        parts: partial(note, index) for index, parts in enumerate(subnetworks.layers)
    }
    try:
        with torch.no_grad(), replaced_layers(functions):
            run()
    except _Reached:
        return hidden[0], told
    raise LayerNotUnderstood(
        f"The model called {len(told)} of its {num_layers} layers."
    )


def contexts_from_mask(
    model: nn.Module, subnetworks: Subnetworks, tokens: Tensor, *, num_layers: int
) -> list[Context]:
    """Return what layers are told, as far as it follows from which tokens there are.

    Parameters
    ----------
    model
        The model.
    subnetworks
        Its sub-networks.
    tokens
        Which tokens there are, boolean, [B, S].
    num_layers
        How many layers, from the first on.
    """
    if not any(parts.sees_positions for parts in subnetworks.layers):
        mask = None if tokens.all() else tokens[:, None, None, :]
        return [Context(mask)] * num_layers
    base: Any = getattr(model, "get_base_model", lambda: model)()
    if getattr(base, "main_input_name", None) != "input_ids":
        raise LayerNotUnderstood(
            f"{type(base).__name__} turns by positions what are no tokens; models of "
            "text, and others whose layers are told of no positions, can be spread "
            "over devices."
        )
    batch_size, length = tokens.shape
    ids = token_ids(base, length, batch_size).to(tokens.device)
    _, told = layer_inputs(
        subnetworks,
        lambda: base(input_ids=ids, attention_mask=tokens.long()),
        num_layers=num_layers,
    )
    return told


def token_mask(
    model: nn.Module,
    subnetworks: Subnetworks,
    told: list[Context],
    hidden: Tensor,
    given: Tensor | None,
) -> Tensor:
    """Return which tokens there are, [B, S], where all that layers are told follows.

    Parameters
    ----------
    model, subnetworks
        The model, and its sub-networks.
    told
        What its layers are told of a batch.
    hidden
        What the first of them is given, [B, S, H].
    given
        The batch's own mask, [B, S], if it has one.

    Raises
    ------
    LayerNotUnderstood
        What they are told does not follow from which tokens there are.
    """
    tokens = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    mask = told[0].attention_mask
    if given is not None and given.shape == tokens.shape:
        tokens = given != 0
    elif mask is not None and mask.dim() == 4:
        tokens = _allowed(mask)[:, 0, -1, :].expand_as(tokens)
    own = contexts_from_mask(model, subnetworks, tokens, num_layers=len(told))
    for index, (one, other) in enumerate(zip(told, own, strict=True)):
        if not _alike(one, other):
            raise LayerNotUnderstood(
                f"What layer {index} is told of this batch does not follow from its "
                "attention mask (positions that begin anew, as in packed rows, or a "
                "mask of the model's own): give batches with one text a row, padded."
            )
    return tokens


def _alike(one: Context, other: Context) -> bool:
    if (one.positions is None) != (other.positions is None):
        return False
    turned = zip(one.positions or (), other.positions or (), strict=True)
    if not all(bool(torch.isclose(a, b).all()) for a, b in turned):
        return False
    if one.attention_mask is None or other.attention_mask is None:
        masks = [m for m in (one.attention_mask, other.attention_mask) if m is not None]
        return all(bool(_allowed(mask).all()) for mask in masks)
    return bool((_allowed(one.attention_mask) == _allowed(other.attention_mask)).all())


def _allowed(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask >= 0
