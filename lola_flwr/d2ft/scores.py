"""How much each sub-network's forward and backward passes are worth.

Source: D2FT, arXiv:2504.12471: the forward score is the Fisher information of a
sub-network, the sum of its weights' squared gradients; the backward score is its weight
magnitude, the sum of their absolute values. The latter is the same in every
micro-batch, so that between micro-batches a gradient score decides: the sum of
``|w * g|``, the first-order change of the loss if the weight were removed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from lola_flwr.d2ft.execution import require_layers
from lola_flwr.d2ft.schedule import Scores
from lola_flwr.d2ft.subnetworks import Subnetworks, parameter_slices
from lola_flwr.model.backprop import Batch, LossFunction, model_loss


def score_subnetworks(
    model: nn.Module,
    subnetworks: Subnetworks,
    trainable: Sequence[str],
    micro_batches: Sequence[Batch],
    *,
    loss_function: LossFunction = model_loss,
) -> Scores:
    """Measure the scores by a full forward and backward pass over each micro-batch.

    Parameters
    ----------
    model
        The model; its parameters of these names must want gradients.
    subnetworks
        Its sub-networks.
    trainable
        Names of the parameters that are trained: the low-rank adapters', if the model
        has them. Only these are scored.
    micro_batches
        M micro-batches.
    loss_function
        Maps model and micro-batch to a mean loss.

    Raises
    ------
    NoGradient
        A layer has none, as far as PyTorch has recorded.
    """
    parameters = dict(model.named_parameters())
    trained = {name: parameters[name] for name in trainable}
    values = parameter_slices(subnetworks, {n: p.detach() for n, p in trained.items()})
    fisher = np.empty((subnetworks.count, len(micro_batches)))
    gradient = np.empty_like(fisher)
    for column, batch in enumerate(micro_batches):
        found = torch.autograd.grad(
            loss_function(model, batch),
            list(trained.values()),
            allow_unused=True,
        )
        named = dict(zip(trained, found, strict=True))
        require_layers(subnetworks, trained, named, range(subnetworks.num_layers))
        slopes = parameter_slices(
            subnetworks,
            {
                name: torch.zeros_like(trained[name]) if one is None else one
                for name, one in named.items()
            },
        )
        for row, (weights, gradients) in enumerate(zip(values, slopes, strict=True)):
            fisher[row, column] = _total(g.square() for g in gradients)
            gradient[row, column] = _total(
                (w * g).abs() for w, g in zip(weights, gradients, strict=True)
            )
    magnitude = np.array([_total(w.abs() for w in weights) for weights in values])
    return Scores(fisher, magnitude, gradient)


def _total(tensors: Iterable[Tensor]) -> float:
    return float(sum(float(tensor.sum()) for tensor in tensors))
