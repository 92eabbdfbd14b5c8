"""Run a model's layers under a table of operations: what is skipped is not computed.

What runs fully is recorded for the backward pass, what runs forward only is computed
without recording anything, and what is skipped does not run. A layer of which nothing
runs is passed by as a whole.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from lola_flwr.d2ft.branches import Context, contribute, enter, leave
from lola_flwr.d2ft.operations import Operation
from lola_flwr.d2ft.subnetworks import Branch, LayerParts, Subnetworks
from lola_flwr.errors import UserError
from lola_flwr.model.recording import require_gradients

# The operations of one micro-batch, [L][G].
OperationTable = Sequence[Sequence[Operation]]

# What stands in for a layer: hidden states, what it is told -> hidden states.
LayerFunction = Callable[[Tensor, Context], Tensor]


def scheduled(subnetworks: Subnetworks, operations: OperationTable) -> replaced_layers:
    """Let a model's layers follow a table of operations for the time of a ``with``.

    A layer whose sub-networks all run fully runs its own code.

    Parameters
    ----------
    subnetworks
        The model's sub-networks.
    operations
        What is done with each of them, [L][G].

    Raises
    ------
    UserError
        The table is of another shape.
    """
    shape = {len(row) for row in operations}
    if len(operations) != subnetworks.num_layers or shape != {subnetworks.num_groups}:
        raise UserError(
            f"operations has {len(operations)} layers of {sorted(shape)} groups; "
            f"the model has {subnetworks.num_layers} of {subnetworks.num_groups}."
        )
    return replaced_layers(
        {
            parts: partial(run_layer, parts, tuple(Operation(o) for o in row))
            for parts, row in zip(subnetworks.layers, operations, strict=True)
            if any(operation != Operation.FULL for operation in row)
        }
    )


class replaced_layers:
    """Let functions stand in for some layers of a model for the time of a ``with``.

    Parameters
    ----------
    functions
        By layer.
    """

    def __init__(self, functions: Mapping[LayerParts, LayerFunction]) -> None:
        self._functions = functions

    def __enter__(self) -> None:
        for parts, function in self._functions.items():
            # Modules call what they find under this name in themselves first.
            parts.layer.__dict__["forward"] = _Forward(parts, function)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for parts in self._functions:
            del parts.layer.__dict__["forward"]


class _Forward:
    """Stands in for a layer's ``forward``."""

    def __init__(self, parts: LayerParts, function: LayerFunction) -> None:
        self._layer, self._function = parts.layer, function
        # transformers 4 expects layers to return tuples.
        returns = inspect.signature(type(parts.layer).forward).return_annotation
        self._in_tuple = "tuple" in str(returns).lower()

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        output = self._function(*told(self._layer, arguments, named))
        return (output,) if self._in_tuple else output


def told(
    layer: nn.Module, arguments: Sequence[Any], named: Mapping[str, Any]
) -> tuple[Tensor, Context]:
    """Return what a call gives a layer: hidden states, and what to know of its tokens.

    Parameters
    ----------
    layer
        The layer.
    arguments, named
        What it is called with, by place and by name.
    """
    given = named_arguments(layer, arguments, named)
    return next(iter(given.values())), Context(
        given.get("attention_mask"), given.get("position_embeddings")
    )


def named_arguments(
    layer: nn.Module, arguments: Sequence[Any], named: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what a layer is called with, all by name: hidden states first."""
    bound = inspect.signature(type(layer).forward).bind(layer, *arguments, **named)
    _, *places = bound.arguments
    # What the signature does not name is in a dictionary of its own.
    return {n: bound.arguments[n] for n in places if n not in ("args", "kwargs")} | {
        name: value for name, value in named.items() if name not in bound.arguments
    }


def run_layer(
    parts: LayerParts,
    row: Sequence[Operation],
    x: Tensor,
    context: Context,
) -> Tensor:
    """Return a layer's output under one operation per sub-network.

    Parameters
    ----------
    parts
        The layer.
    row
        Operation of each of its G sub-networks.
    x
        Input, [B, S, H].
    context
        What it is told of its tokens.
    """
    if all(operation == Operation.SKIP for operation in row):
        return x
    for branch in Branch:
        y = enter(parts, branch, row, x)
        total = contribute(parts, branch, row, y, context)
        x = leave(parts, branch, row, x, total)
    return x


def require_layers(
    subnetworks: Subnetworks,
    parameters: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor | None],
    layers: Iterable[int],
) -> None:
    """Refuse gradients that leave a layer out.

    Parameters
    ----------
    subnetworks
        The model's sub-networks.
    parameters
        The model's parameters.
    gradients
        Gradients of the trained ones; None where the backward pass met none.
    layers
        The layers of which something runs fully.

    Raises
    ------
    NoGradient
        One of them has no gradient at all.
    """
    missing = {name for name, gradient in gradients.items() if gradient is None}
    for index in layers if missing else ():
        inside = set(map(id, subnetworks.layers[index].layer.parameters()))
        names = [name for name in gradients if id(parameters[name]) in inside]
        require_gradients(f"layer {index}", names, missing)
