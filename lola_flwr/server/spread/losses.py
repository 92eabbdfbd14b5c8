"""What the owners of micro-batches send of their losses, and how long it may be.

The server has no labels to compute with: a gradient that an owner sends of its losses
is held to the length that such gradients usually have.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType

from torch import Tensor

from lola_flwr.d2ft.wire import SLOPES
from lola_flwr.server.norm_limits import NormHistory, NormLimits
from lola_flwr.server.spread.exchange import (
    LARGEST_HEAD_GRADIENT,
    LARGEST_LOSS_SLOPE,
    CheckedReply,
)
from lola_flwr.wire.packing import GRADIENTS

# What has a usual norm of its own.
_SLOPES, _HEAD = range(2)


@dataclass(frozen=True, eq=False)
class LossLimits:
    """How long gradients of losses may be.

    Parameters
    ----------
    limits
        How many times as long as usual. What is longer is scaled to what is usual, and
        what is far longer counts for nothing; nobody is blamed for it, since late in
        training one hard example makes a micro-batch as long as a lie.
    norms
        How long they were lately. A step is judged by its own, too, so that the first
        one is.
    names
        The devices' names, by id.
    shown
        Whether a device's loss is cross-entropy, as it showed last, by its name.
    """

    limits: NormLimits = field(default_factory=lambda: NormLimits(max_norm=math.inf))
    norms: NormHistory = field(default_factory=NormHistory)
    names: Mapping[str, str] = field(default_factory=dict)
    shown: Mapping[str, bool] = field(default_factory=dict)

    def after(
        self,
        received: Mapping[str, OwnLosses],
        shown: Mapping[str, bool] = MappingProxyType({}),
    ) -> LossLimits:
        """Return the limits for what is received in a step, and shown, by device id."""
        norms = self.norms.after(
            (kind, norm, self.names.get(device, device))
            for device, own in received.items()
            for kind, norm in own.norms()
        )
        named = {
            self.names.get(device, device): is_so for device, is_so in shown.items()
        }
        return replace(self, norms=norms, shown={**self.shown, **named})

    def scale(self, kind: int, norm: float) -> float:
        """Return what a gradient of a kind and a norm is multiplied with."""
        return self.limits.scale(norm, self.norms.usual(kind))


@dataclass(frozen=True, eq=False)
class OwnLosses:
    """What one device makes of its micro-batches.

    Parameters
    ----------
    weights
        What the loss of each is a mean over: examples, or tokens.
    losses
        These losses.
    slopes
        The gradient of each with respect to what the last layer gave for it.
    head
        The gradient of the mean loss of all with respect to the head, by parameter.
    """

    weights: Sequence[int]
    losses: Sequence[float]
    slopes: Sequence[Tensor]
    head: Sequence[Tensor]

    @classmethod
    def of(
        cls,
        reply: CheckedReply,
        outputs: Sequence[Tensor],
        head: Sequence[Tensor],
        example_weight: int,
    ) -> OwnLosses:
        """Read a device's reply.

        Parameters
        ----------
        reply
            The reply.
        outputs
            What the last layer gave for each of its micro-batches.
        head
            The head's parameters.
        example_weight
            What an example weighs at most.

        Raises
        ------
        PartFailed
            It is no such reply.
        """
        return cls(
            reply.weights([len(output) * example_weight for output in outputs]),
            reply.losses(len(outputs)),
            reply.tensors(
                SLOPES, [tuple(x.shape) for x in outputs], largest=LARGEST_LOSS_SLOPE
            ),
            reply.tensors(
                GRADIENTS, [tuple(p.shape) for p in head], largest=LARGEST_HEAD_GRADIENT
            ),
        )

    def norms(self) -> Iterator[tuple[int, float]]:
        """Give kind and norm of each gradient that weighs anything."""
        for weight, norm in zip(self.weights, self._slope_norms, strict=True):
            if weight:
                yield _SLOPES, norm
        if any(self.weights):
            yield _HEAD, self._head_norm

    def held_to(self, limits: LossLimits) -> OwnLosses:
        """Return the same with gradients that are no longer than they may be."""
        slopes = [
            limits.scale(_SLOPES, norm) * slope
            for norm, slope in zip(self._slope_norms, self.slopes, strict=True)
        ]
        scale = limits.scale(_HEAD, self._head_norm)
        return replace(self, slopes=slopes, head=[scale * part for part in self.head])

    @cached_property
    def _slope_norms(self) -> list[float]:
        """Of each micro-batch the root mean square of its examples' own gradients."""
        weighed = zip(self.weights, self.slopes, strict=True)
        return [_norm(weight, [slope]) for weight, slope in weighed]

    @cached_property
    def _head_norm(self) -> float:
        """A mean's length times what noise makes it shorter by, than an example's."""
        return _norm(sum(self.weights), self.head)


def _norm(weight: int, gradient: Sequence[Tensor]) -> float:
    """Return the Euclidean norm of a mean's gradient, times the root of its weight."""
    squares = sum(float(part.double().square().sum()) for part in gradient)
    return math.sqrt(weight * squares)
