"""Compute a gradient's projections themselves, by forward-mode differentiation.

Beside the loss, its derivative along a direction is carried through the forward pass
(Jacobian-vector products). Nothing is kept for a backward pass; nothing is moved, so
that there is no step to choose and no difference of near losses to round. Several
directions go through one pass: what does not depend on them, the layers below the block
first of all, is computed once.

Source: Panchal et al., "Thinking Forward: Memory-Efficient Federated Finetuning of
Language Models" (Spry), arXiv:2405.15551.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from lola_flwr.arrays import Float32Array
from lola_flwr.errors import UserError, reason_of
from lola_flwr.model.backprop import Batch, LossFunction, model_loss
from lola_flwr.model.stored_base import evaluation_mode
from lola_flwr.zeroth_order.directions import Directions

# Directions of one pass: with more each costs less, and all take more memory.
AT_A_TIME = 2


def directional_derivatives(
    model: nn.Module,
    names: Sequence[str],
    batch: Batch,
    *,
    directions: Directions,
    loss_function: LossFunction = model_loss,
) -> tuple[Float32Array, float]:
    """Compute the gradient's projections on some directions, without a gradient.

    Parameters
    ----------
    model
        The model. It is put in evaluation mode, as where losses are compared.
    names
        Parameters that the gradient is of.
    batch
        Arguments of the model.
    directions
        The directions; their perturbation has no meaning.
    loss_function
        Maps model and batch to a mean loss.

    Returns
    -------
    The projections, shape [count], and the mean loss.

    Raises
    ------
    UserError
        An operation of the model has no forward derivative, or none for several
        directions at a time.
    """
    evaluation_mode(model)
    parameters = dict(model.named_parameters())
    values = {name: parameters[name].numpy(force=True) for name in names}
    projections: list[float] = []
    for first in range(0, directions.count, AT_A_TIME):
        numbers = range(first, min(first + AT_A_TIME, directions.count))
        tangents = {
            name: _stacked(directions, numbers, name, values[name]).to(parameters[name])
            for name in names
        }
        loss, products = derivatives_along(
            model, tangents, lambda model: loss_function(model, batch)
        )
        projections += products.tolist()
    return np.array(projections, np.float32), loss.item()


def derivatives_along(
    model: nn.Module,
    tangents: Mapping[str, Tensor],
    loss_of: Callable[[nn.Module], Tensor],
) -> tuple[Tensor, Tensor]:
    """Run a model once, and carry derivatives along some directions through it.

    Parameters
    ----------
    model
        The model, in evaluation mode.
    tangents
        Of each parameter that is meant its part of the directions, shape [c, ...].
    loss_of
        Gives the loss.

    Returns
    -------
    The loss, and its derivatives, shape [c].
    """
    loss_module = _Loss(model, loss_of)
    primals = {f"model.{name}": model.get_parameter(name).detach() for name in tangents}

    def loss_at(parameters: Mapping[str, Tensor]) -> Tensor:
        loss: Tensor = functional_call(loss_module, dict(parameters), ())
        return loss

    def along(tangent: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        loss, product, *_ = jvp(loss_at, (primals,), (tangent,))
        return loss, product

    named = {f"model.{name}": tangent for name, tangent in tangents.items()}
    try:
        # Fused attention has no forward derivative; what it is made of has one.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            # The loss is one for all directions, which the type of out_dims lacks.
            dims: Any = (None, 0)
            loss, products = vmap(along, out_dims=dims)(named)
    except (NotImplementedError, RuntimeError) as error:
        if not _lacks_a_derivative(error):
            raise
        raise UserError(
            f"{type(model).__name__} has no forward-mode derivative "
            f"({reason_of(error)}); set a perturbation above 0, by which losses are "
            "compared."
        ) from error
    return loss, products


class _Loss(nn.Module):
    """The loss as a module, whose parameters can be replaced."""

    def __init__(self, model: nn.Module, loss_of: Callable[[nn.Module], Tensor]):
        super().__init__()
        self.model = model
        self.loss_of = loss_of

    def forward(self) -> Tensor:
        return self.loss_of(self.model)


def _lacks_a_derivative(error: Exception) -> bool:
    words = ("forward AD", "functorch", "vmap", "jvp")
    said = str(error)
    return isinstance(error, NotImplementedError) or any(w in said for w in words)


def _stacked(
    directions: Directions, numbers: Sequence[int], name: str, values: Float32Array
) -> Tensor:
    """Draw a tensor's part of some directions, shape [c, *shape]."""
    drawn = np.empty((len(numbers), values.size), np.float32)
    for row, number in zip(drawn, numbers, strict=True):
        start = 0
        for signs in directions.along(number, name, values):
            row[start : start + signs.size] = signs
            start += signs.size
    return torch.from_numpy(drawn.reshape(len(numbers), *values.shape))
