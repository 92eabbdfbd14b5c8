"""The loss of each example of a mini-batch, and their mean where examples are weighed.

A mini-batch may say what its examples weigh, beside the model's arguments. Its loss is
then the mean of weight times loss over the examples, not over the weights: so it is the
same whether it is computed at once or in micro-batches, and the gradient estimates that
of a population without bias where the weights are importance weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lola_flwr.errors import UserError

# What a mini-batch holds beside the arguments of the model: what each example weighs,
# shape [B], and which of the device's examples it is, shape [B].
EXAMPLE_WEIGHTS = "example_weights"
EXAMPLE_ROWS = "example_rows"

# Between the mean of the losses and the model's own, of bfloat16's rounding.
_ROUNDING = 1e-2


def example_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the cross entropy of each example under a classifier.

    Parameters
    ----------
    model
        A classifier of Hugging Face's kind, whose own loss is the mean of these.
    batch
        Its arguments, with ``labels`` of shape [B]; weights and rows are left out.

    Returns
    -------
    Losses, shape [B].

    Raises
    ------
    UserError
        The model is no such classifier, or its loss is another one.
    """
    classifier: Any = model
    output = classifier(
        **{
            name: values
            for name, values in batch.items()
            if name not in (EXAMPLE_WEIGHTS, EXAMPLE_ROWS)
        }
    )
    logits, labels = output.logits, batch["labels"]
    if logits.ndim != 2 or labels.ndim != 1 or labels.is_floating_point():
        raise UserError(
            "Examples are weighed in a classifier's loss, of logits [B, C] and labels "
            f"[B]; {type(model).__name__} gave logits {list(logits.shape)} for "
            f"{labels.dtype} labels {list(labels.shape)}. Draw examples at random."
        )
    losses = nn.functional.cross_entropy(logits.float(), labels, reduction="none")
    mean, own = losses.mean().item(), output.loss.item()
    if not abs(mean - own) <= _ROUNDING * max(abs(own), 1.0):
        raise UserError(
            f"Examples are weighed in the mean cross entropy, which is {mean:.4g}, but "
            f"the loss of {type(model).__name__} is {own:.4g}: it is another one. Draw "
            "examples at random."
        )
    return losses


def weighted_mean(losses: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the mean over examples of what they weigh times their losses."""
    weights: Tensor = batch[EXAMPLE_WEIGHTS]
    return torch.mean(weights.to(losses) * losses)
