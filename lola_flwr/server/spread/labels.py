"""Whether an owner's gradients of losses are those that labels have.

Labels are the owner's alone, but under cross-entropy an example's gradient with respect
to its hidden states is one of as many as there are labels, and the server, which has
the head, can compute them all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

# What has no label; transformers' own number, and PyTorch's.
NO_LABEL = -100
# In distances between labels, what is rounding alone.
_ROUNDING = 1e-5


@dataclass(frozen=True, eq=False)
class LabelledLoss:
    """What comes of one micro-batch under some labels.

    Parameters
    ----------
    loss
        The mean loss.
    slopes
        Its gradient with respect to hidden states, [B, S, H].
    head
        Its gradient with respect to the head, by parameter.
    """

    loss: float
    slopes: Tensor
    head: Sequence[Tensor]


# Labels of a micro-batch's examples, [B] -> what comes of it.
LossUnder = Callable[[Tensor], LabelledLoss]


@dataclass(frozen=True, eq=False)
class Nearest:
    """The labels whose gradients are nearest to those that were sent.

    Parameters
    ----------
    far
        How far the furthest example's gradient is from its label's, in that one's
        length.
    apart
        The same in the distance between the two labels furthest apart.
    labels
        These labels; those of examples without one are below zero, [B].
    implied
        What comes of them.
    head_unit
        The distance between labels, of the head's gradient.
    """

    far: float
    apart: float
    labels: Tensor
    implied: LabelledLoss
    head_unit: float


def nearest_labels(under: LossUnder, num_labels: int, slopes: Tensor) -> Nearest | None:
    """Find the labels that are nearest to gradients; None where labels are all alike.

    Parameters
    ----------
    under
        Gives the losses of the micro-batch.
    num_labels
        C labels.
    slopes
        The gradients that were sent, [B, S, H].
    """
    count = len(slopes)
    each = [under(torch.full((count,), label)) for label in range(num_labels)]
    table = torch.stack([one.slopes.flatten(1) for one in each])  # [C, B, S * H]
    pairs = [*combinations(range(num_labels), 2)]
    unit = torch.stack([_lengths(table[a] - table[b]) for a, b in pairs]).amax(0)
    if not (unit > 0).all():
        return None
    sent = slopes.flatten(1)
    labels = _labels(table, sent, unit)
    learned = int((labels >= 0).sum())
    implied = under(labels) if learned else _nothing(each[0])
    unit = unit * (count / max(learned, 1))
    own = implied.slopes.flatten(1)
    away = _lengths(sent - own) - _ROUNDING * unit
    far = torch.where(away <= 0, 0.0, away / _lengths(own))
    return Nearest(
        far=float(far.max()),
        apart=float((away / unit).max()),
        labels=labels,
        implied=implied,
        head_unit=max(distance(each[a].head, each[b].head) for a, b in pairs),
    )


def _labels(table: Tensor, sent: Tensor, unit: Tensor) -> Tensor:
    """Return the nearest labels, [B], where a mean is over those that have one.

    An example whose gradient is zero has none, or is one that the model is sure of. As
    many have none as brings all gradients nearest to labels.
    """
    count = len(sent)
    zero = (sent == 0).all(dim=1)
    best, found = math.inf, torch.full((count,), NO_LABEL)
    for kept in range(count, max(count - int(zero.sum()), 1) - 1, -1):
        scale = count / kept
        apart, labels = _lengths(sent - scale * table).min(dim=0)
        apart = apart / (scale * unit)
        order = torch.where(zero, apart, -1.0).argsort(descending=True)
        apart[order[: count - kept]], labels[order[: count - kept]] = 0.0, NO_LABEL
        if float(apart.max()) < best:
            best, found = float(apart.max()), labels
    # All zeros are no gradient at all, whatever labels would make of it.
    return torch.full((count,), NO_LABEL) if zero.all() else found


def _nothing(like: LabelledLoss) -> LabelledLoss:
    head = [torch.zeros_like(part) for part in like.head]
    return LabelledLoss(0.0, torch.zeros_like(like.slopes), head)


def _lengths(vectors: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(vectors, dim=-1, dtype=torch.float64)
    return lengths


def distance(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Return the Euclidean distance of two gradients, in parts."""
    pairs = zip(one, other, strict=True)
    return math.sqrt(sum(float((a - b).double().square().sum()) for a, b in pairs))
