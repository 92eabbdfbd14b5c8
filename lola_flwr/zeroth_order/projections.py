"""Measure a gradient's projections by forward passes alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from lola_flwr.arrays import Float32Array
from lola_flwr.model.backprop import Batch, LossFunction, model_loss
from lola_flwr.model.stored_base import evaluation_mode
from lola_flwr.zeroth_order.directions import Directions


def projected_gradients(
    model: nn.Module,
    names: Sequence[str],
    batch: Batch,
    *,
    directions: Directions,
    loss_function: LossFunction = model_loss,
) -> tuple[Float32Array, float]:
    """Measure the gradient's projections on some directions.

    Parameters
    ----------
    model
        The model. It is put in evaluation mode: dropout would add its own noise to the
        difference of the losses.
    names
        Parameters to move; all of them are back at their values, bit by bit, at the
        end.
    batch
        Arguments of the model.
    directions
        The directions.
    loss_function
        Maps model and batch to a mean loss.

    Returns
    -------
    The projections, shape [count], and the mean loss over all forward passes.

    Notes
    -----
    Beyond a forward pass this takes the memory of one copy of the moved parameters.
    """
    evaluation_mode(model)
    parameters = dict(model.named_parameters())
    moved = {name: parameters[name] for name in names}
    kept = {name: parameter.detach().clone() for name, parameter in moved.items()}
    values = {name: tensor.cpu().numpy() for name, tensor in kept.items()}

    def loss_at(number: int, step: float) -> float:
        for name, parameter in moved.items():
            target = parameter.data.view(-1)
            origin = kept[name].view(-1)
            start = 0
            for signs in directions.along(number, name, values[name]):
                part = slice(start, start + signs.size)
                move = torch.from_numpy(signs).to(target.device)
                torch.add(origin[part], move, alpha=step, out=target[part])
                start += signs.size
        return loss_function(model, batch).item()

    step = directions.perturbation
    projections, losses = [], []
    try:
        with torch.no_grad():
            for number in range(directions.count):
                ahead = loss_at(number, step)
                behind = loss_at(number, -step)
                projections.append((ahead - behind) / (2 * step))
                losses += [ahead, behind]
    finally:
        with torch.no_grad():
            for name, parameter in moved.items():
                parameter.copy_(kept[name])
    return np.array(projections, np.float32), float(np.mean(losses))
