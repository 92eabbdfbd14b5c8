"""What the server asks of the owners of the micro-batches: inputs and losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lola_flwr.d2ft.subnetworks import hidden_size
from lola_flwr.d2ft.wire import (
    HIDDEN,
    MASKS,
    array_of,
    numbers_to_text,
    sizes_to_text,
)
from lola_flwr.server.spread.audit import Recompute
from lola_flwr.server.spread.exchange import LARGEST_HIDDEN, PartFailed, PartRequest
from lola_flwr.server.spread.losses import LossLimits, OwnLosses
from lola_flwr.server.spread.model import SpreadModel
from lola_flwr.server.spread.own_losses import OwnHead
from lola_flwr.server.spread.verdicts import refuse_lies
from lola_flwr.wire.packing import VALUES


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """A micro-batch, which a device drew and holds the labels of.

    Parameters
    ----------
    owner
        Id of that device.
    number
        Its number in the run.
    hidden
        What the first layer is given, [B, S, H].
    mask
        Which of its tokens there are, [B, S].
    digest
        What its owner knows it by, and the others of its owner in this step.
    """

    owner: str
    number: int
    hidden: Tensor
    mask: Tensor
    digest: str


@dataclass(frozen=True, eq=False)
class Losses:
    """What the owners make of the micro-batches.

    Parameters
    ----------
    mean
        Mean loss over all examples, or over what losses are means over.
    slopes
        Its gradient with respect to what the last layer gave for each micro-batch.
    head
        Its gradient with respect to the head, by name.
    limits
        How long such gradients may be after these.
    """

    mean: float
    slopes: list[Tensor]
    head: dict[str, Tensor]
    limits: LossLimits


def draw_micro_batches(
    spread: SpreadModel,
    numbers: Mapping[str, Sequence[int]],
    batch_size: int,
    max_tokens: int,
) -> list[MicroBatch]:
    """Have micro-batches drawn, and what the first layer is given for each.

    Parameters
    ----------
    spread
        The model.
    numbers
        Numbers of the micro-batches that each device is to draw.
    batch_size, max_tokens
        Examples of a micro-batch, and tokens of an example, at most.

    Returns
    -------
    The micro-batches, by number.
    """
    tasks = {
        device: replace(
            spread.task,
            kind="inputs",
            numbers=numbers_to_text(mine),
            batch_size=batch_size,
        )
        for device, mine in numbers.items()
    }
    replies = spread.ask({device: PartRequest(task) for device, task in tasks.items()})
    drawn = []
    for device, reply in replies.items():
        sizes = reply.sizes(len(numbers[device]), batch_size, max_tokens)
        shapes = [(*size, hidden_size(spread.subnetworks)) for size in sizes]
        for number, hidden, mask in zip(
            numbers[device],
            reply.tensors(HIDDEN, shapes, largest=LARGEST_HIDDEN),
            reply.tensors(MASKS, sizes, largest=1, dtype=np.dtype("u1")),
            strict=True,
        ):
            drawn.append(MicroBatch(device, number, hidden, mask, reply.digest))
    return sorted(drawn, key=lambda one: one.number)


def losses_of(
    spread: SpreadModel,
    micro_batches: Sequence[MicroBatch],
    batch_size: int,
    outputs: Sequence[Tensor],
    limits: LossLimits,
    *,
    example_weight: int = 1,
    compute: Recompute | None = None,
) -> Losses:
    """Have the owners turn what the last layer gave into a loss.

    Parameters
    ----------
    spread
        The model.
    micro_batches, batch_size
        As for `draw_micro_batches`.
    outputs
        What the last layer gave for each of them.
    limits
        How long an owner's gradients may be.
    example_weight
        What an example weighs at most.
    compute
        Computes as a device does, to compare owners' gradients with those that labels
        have (default: they are not compared).

    Raises
    ------
    LieFound
        An owner's gradients are those of no labels.
    PartFailed
        An owner did not do its part, or no micro-batch weighs anything.
    """
    head = {name: spread.parameters[name] for name in spread.partition.head}
    values = array_of([*head.values()])
    mine: dict[str, list[int]] = {}
    for m, one in enumerate(micro_batches):
        mine.setdefault(one.owner, []).append(m)
    requests = {
        device: PartRequest(
            replace(
                spread.task,
                kind="loss",
                numbers=numbers_to_text(micro_batches[m].number for m in members),
                batch_size=batch_size,
                sizes=sizes_to_text([outputs[m] for m in members]),
                digest=micro_batches[members[0]].digest,
            ),
            {HIDDEN: array_of([outputs[m] for m in members]), VALUES: values},
        )
        for device, members in mine.items()
    }
    received = {
        device: OwnLosses.of(
            reply, [outputs[m] for m in mine[device]], [*head.values()], example_weight
        )
        for device, reply in spread.ask(requests).items()
    }
    total = sum(sum(own.weights) for own in received.values())
    if not total:
        raise PartFailed({}, "no token of these micro-batches has a label")
    own_head = OwnHead.of(spread, compute) if example_weight == 1 else None
    verdicts = {}
    if own_head is not None:
        given = {device: [outputs[m] for m in mine[device]] for device in received}
        verdicts = own_head.verdicts(received, given)
    shown = {d: v.shows for d, v in verdicts.items() if v.shows is not None}
    limits = limits.after(received, shown)
    refuse_lies(verdicts, limits.shown)
    # What labels make of an example is as long as it should be.
    near = {device for device, verdict in verdicts.items() if verdict.is_near}
    mean = 0.0
    slopes: dict[int, Tensor] = {}
    gradient = {name: torch.zeros_like(p) for name, p in head.items()}
    for device, members in mine.items():
        own = received[device]
        if device not in near:
            own = own.held_to(limits)
        shares = [weight / total for weight in own.weights]
        mean += sum(s * loss for s, loss in zip(shares, own.losses, strict=True))
        for m, share, slope in zip(members, shares, own.slopes, strict=True):
            slopes[m] = share * slope
        for name, part in zip(head, own.head, strict=True):
            gradient[name] += sum(shares) * part
    return Losses(mean, [slopes[m] for m in range(len(outputs))], gradient, limits)
