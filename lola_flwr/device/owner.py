"""What the owners of the micro-batches compute: inputs and losses."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from lola_flwr.d2ft.branches import Context
from lola_flwr.d2ft.contexts import layer_inputs, token_mask
from lola_flwr.d2ft.execution import LayerFunction, replaced_layers
from lola_flwr.d2ft.wire import (
    HIDDEN,
    MASKS,
    SLOPES,
    array_of,
    digest_of,
    numbers_to_text,
    sizes_to_text,
)
from lola_flwr.device.asked import Part, PartResult, load
from lola_flwr.errors import UserError
from lola_flwr.model.backprop import only_trainable
from lola_flwr.model.recording import ADVICE, NoGradient
from lola_flwr.wire.packing import GRADIENTS, VALUES


def draw_inputs(part: Part) -> PartResult:
    """Draw micro-batches, and give what the first layer is given for each."""
    inputs, masks = [], []
    batches = part.batches()
    for number, batch in zip(part.numbers, batches, strict=True):
        part.restart_dropout(number)
        hidden, told = layer_inputs(
            part.subnetworks,
            partial(part.loss_function, part.model, batch),
            num_layers=part.subnetworks.num_layers,
        )
        inputs.append(hidden)
        given = batch.get("attention_mask")
        masks.append(token_mask(part.model, part.subnetworks, told, hidden, given))
    return part.report(sizes=sizes_to_text(inputs), digest=digest_of(batches)), {
        HIDDEN: array_of(inputs),
        MASKS: array_of(masks).astype(np.uint8),
    }


@torch.enable_grad()
def compute_losses(part: Part) -> PartResult:
    """Turn what the last layer gave into losses, and give their gradients."""
    first, *others = part.subnetworks.layers
    head = [part.parameters[name] for name in part.partition.head]
    load(head, part.arrays[VALUES])
    losses: list[float] = []
    slopes: list[Tensor] = []
    total = [torch.zeros_like(parameter) for parameter in head]
    batches = part.batches()
    if digest_of(batches) != part.task.digest:
        raise UserError(
            f"The micro-batches {part.task.numbers} are others than a moment ago: "
            "batch_source must give the same batch whenever it is asked for the same "
            "number, as it is twice a step."
        )
    weights = [part.batch_weight(batch) for batch in batches]
    with only_trainable(part.model, part.partition.head):
        for number, batch, hidden, weight in zip(
            part.numbers, batches, part.hidden(HIDDEN), weights, strict=True
        ):
            if not weight:  # a mean over nothing
                losses.append(0.0)
                slopes.append(torch.zeros_like(hidden))
                continue
            part.restart_dropout(number)
            with replaced_layers(
                {
                    first: _giving(hidden.requires_grad_()),
                    **dict.fromkeys(others, _passing),
                }
            ):
                loss = part.loss_function(part.model, batch)
            slope, *found = torch.autograd.grad(
                loss, [hidden, *head], allow_unused=True
            )
            if slope is None:
                raise NoGradient(
                    "The loss does not depend on what the last layer gives, as far as "
                    f"PyTorch has recorded; {ADVICE}."
                )
            losses.append(loss.item())
            slopes.append(slope)
            for sum_, gradient in zip(total, found, strict=True):
                if gradient is not None:
                    sum_ += gradient * (weight / sum(weights))
    report = part.report(
        losses=np.array(losses, "<f4").tobytes(), weights=numbers_to_text(weights)
    )
    return report, {SLOPES: array_of(slopes), GRADIENTS: array_of(total)}


def _giving(hidden: Tensor) -> LayerFunction:
    return lambda *_: hidden


def _passing(hidden: Tensor, _: Context) -> Tensor:
    return hidden
