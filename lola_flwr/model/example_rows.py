"""Some rows of the gradients of a batch's examples, all in one backward pass.

What tells where an example pulls is a few rows of each parameter's gradient, and for
these no gradient of any whole parameter is needed. A linear map's are the products of
some columns of its output's gradient with its input, summed over the tokens of the one
example. The gradients of other modules (norms, convolutions) are computed by
`torch.func` over the module alone.

`torch.func.vmap` over a whole model does not do instead: transformers looks at an
attention mask's values before it computes, which has no rule there (5.24), and
without a mask it takes twice as long, since it makes every example's whole gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from lola_flwr.arrays import IntArray
from lola_flwr.model.backprop import only_trainable

# By parameter; None: all of them.
Rows = Mapping[str, IntArray | None]


class NotSeparable(RuntimeError):
    """The examples' gradients cannot be told from each other in one pass."""


def example_rows(
    model: nn.Module, rows: Rows, count: int, loss: Callable[[], Tensor]
) -> dict[str, Tensor]:
    """Return rows of the gradients of the examples that a loss is a sum over.

    It holds for modules that keep examples apart by their first dimension, and whose
    parameters only they use: whoever calls this compares some with `block_gradient`.

    Parameters
    ----------
    model
        The model, without dropout.
    rows
        Which rows of which parameters.
    count
        Examples, B.
    loss
        Computes the loss, with this model.

    Returns
    -------
    For each parameter that the loss depends on float32 values [B, V]: of each example
    the V values of these rows, one after the other.

    Raises
    ------
    NotSeparable
        A parameter's module is not called with one tensor of B examples.
    """
    found: dict[str, Tensor] = {}
    wanted: dict[str, list[str]] = {}
    for name in rows:
        path, _, leaf = name.rpartition(".")
        wanted.setdefault(path, []).append(leaf)

    def note(
        path: str, module: nn.Module, args: Any, named: Any, output: Any
    ) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        given = [*args, *named.values()]
        tensors = [t for t in (*given, output) if isinstance(t, Tensor)]
        alone = len(given) == 1 and len(tensors) == 2 and not [*module.children()]
        if not alone or any(not t.ndim or len(t) != count for t in tensors):
            raise NotSeparable(f"{path} does not take one tensor of the batch alone")
        inputs = given[0].detach()
        if not output.requires_grad:
            # Where recording begins; a leaf could not be changed in place.
            output = output.detach().requires_grad_().clone()

        def take(gradient: Tensor) -> None:
            chosen = {leaf: rows[_named(path, leaf)] for leaf in wanted[path]}
            for leaf, values in _rows_of(module, chosen, inputs, gradient).items():
                name = _named(path, leaf)
                found[name] = found[name] + values if name in found else values

        output.register_hook(take)
        return output  # type: ignore[no-any-return]

    handles = [
        model.get_submodule(path).register_forward_hook(
            partial(note, path), with_kwargs=True
        )
        for path in wanted
    ]
    # No parameter's own gradient is wanted: what is recorded begins with the hooks.
    with only_trainable(model, ()), torch.enable_grad():
        try:
            total = loss()
        finally:
            for handle in handles:
                handle.remove()
        if total.requires_grad:
            total.backward()  # type: ignore[no-untyped-call]
    return found


def _named(path: str, leaf: str) -> str:
    return f"{path}.{leaf}" if path else leaf


def _rows_of(
    module: nn.Module, rows: Rows, inputs: Tensor, gradient: Tensor
) -> dict[str, Tensor]:
    """Return a module's part: rows by the parameter's name in it, [B, V]."""
    with torch.no_grad():
        if type(module) is nn.Linear:
            every = _of_linear(rows, gradient, inputs, gradient)
        elif type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
            # GPT-2's linear map, whose weight has a row for each input.
            every = _of_linear(rows, inputs, gradient, gradient)
        else:
            every = _of_any(module, rows, inputs, gradient)
    return {name: values.flatten(1) for name, values in every.items()}


def _of_linear(
    rows: Rows, of_rows: Tensor, across: Tensor, gradient: Tensor
) -> dict[str, Tensor]:
    """Return those of a linear map, by what its weight's rows and columns stand for."""
    of_rows, across, gradient = (
        values.reshape(len(values), -1, values.shape[-1]).float()
        for values in (of_rows, across, gradient)
    )
    found = {}
    for name, chosen in rows.items():
        if name == "bias":
            found[name] = gradient.sum(dim=1)
            continue
        columns = of_rows if chosen is None else of_rows[:, :, torch.from_numpy(chosen)]
        found[name] = columns.transpose(1, 2) @ across
    return found


def _of_any(
    module: nn.Module, rows: Rows, inputs: Tensor, gradient: Tensor
) -> dict[str, Tensor]:
    """Return those of a module that is run once more, for each example by itself."""
    own = dict(module.named_parameters(recurse=False))
    values = {name: own[name].detach() for name in rows}

    def of_one(one: Tensor, arrived: Tensor) -> dict[str, Tensor]:
        def output(parameters: dict[str, Tensor]) -> Tensor:
            computed: Tensor = functional_call(module, parameters, (one[None],))
            return computed

        pulled: Any = vjp(output, values)[1]
        found: dict[str, Tensor] = pulled(arrived[None])[0]
        return found

    every = vmap(of_one)(inputs, gradient)
    found = {}
    for name, chosen in rows.items():
        each = every[name].float()
        if chosen is not None and each.ndim > 2:
            each = each[:, torch.from_numpy(chosen)]
        found[name] = each
    return found
