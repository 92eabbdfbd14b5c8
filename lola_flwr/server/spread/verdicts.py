"""Who lies about losses, once it is known what owners' losses are.

Nobody is measured by labels before most owners have shown that their loss is plain
cross-entropy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from lola_flwr.server.spread.exchange import LieFound
from lola_flwr.server.spread.labels import NO_LABEL, Nearest, distance
from lola_flwr.server.spread.losses import OwnLosses
from lola_flwr.server.spread.tolerances import TOLERANCE

# Whose gradients are no further from labels' than this, in lengths of these, has plain
# cross-entropy, since with all labels in a micro-batch weights of classes then differ
# by a factor of 1.11 at most, and labels are smoothed by 0.1 at most. bfloat16 is apart
# by 0.03.
_NEAR = TOLERANCE / 2
# Whose are further, in distances between labels, lies: what such weights or smoothing,
# and bfloat16, make of an honest one is below 0.25. A false label is 1 from the true.
_LIE = 0.3
# The same of the head's gradient, a mean in which examples' may cancel out.
_HEAD_LIE = 0.5
# Before so many devices, and two thirds of those that showed anything, have shown that
# their loss is cross-entropy, nobody is judged.
_FEWEST = 3


@dataclass(frozen=True)
class Verdict:
    """How near to labels what an owner sent is.

    Parameters
    ----------
    apart, head_apart
        How far its gradients with respect to hidden states, and to the head, are from
        those of the nearest labels, in distances between labels.
    is_near
        Whether gradients and losses are those of labels.
    has_all_labels
        Whether one of its micro-batches has all of them: otherwise its classes may
        have weights, and it be near by chance.
    """

    apart: float
    head_apart: float
    is_near: bool
    has_all_labels: bool

    @classmethod
    def of(cls, own: OwnLosses, nearest: Sequence[Nearest], num_labels: int) -> Verdict:
        """Compare what an owner sent with what labels make of its micro-batches."""
        shares = [weight / sum(own.weights) for weight in own.weights]
        weighed = [
            (share, loss, one)
            for share, loss, one in zip(shares, own.losses, nearest, strict=True)
            if share
        ]
        expected = [torch.zeros_like(part) for part in own.head]
        for share, _, one in weighed:
            for sum_, part in zip(expected, one.implied.head, strict=True):
                sum_ += share * part
        unit = sum(share * one.head_unit for share, _, one in weighed)
        head_apart = distance(own.head, expected) / unit if unit else 0.0
        return cls(
            apart=max(one.apart for _, _, one in weighed),
            head_apart=head_apart,
            is_near=head_apart <= _NEAR
            and all(
                one.far <= _NEAR
                and abs(loss - one.implied.loss) <= _NEAR * max(1.0, one.implied.loss)
                for _, loss, one in weighed
            ),
            has_all_labels=any(
                len({*one.labels.tolist()} - {NO_LABEL}) == num_labels
                for _, _, one in weighed
            ),
        )

    @property
    def shows(self) -> bool | None:
        """Whether its loss is cross-entropy; None where that is not to be known."""
        if self.is_near and not self.has_all_labels:
            return None
        return self.is_near

    @property
    def lie(self) -> str:
        """What no cross-entropy makes of any labels; empty: nothing."""
        for what, apart, limit in (
            ("gradients of losses", self.apart, _LIE),
            ("gradient of the head", self.head_apart, _HEAD_LIE),
        ):
            if not apart <= limit:  # nor is NaN
                return (
                    f"its {what}: {apart:.3g} of the distance between labels away from "
                    f"what any labels make of it, honest ones {limit:g} at most; it "
                    "is excluded from this run"
                )
        return ""


def refuse_lies(verdicts: Mapping[str, Verdict], shown: Mapping[str, bool]) -> None:
    """Accuse who sent what no labels make, where most have shown that labels do.

    Parameters
    ----------
    verdicts
        By device id.
    shown
        Whether a device's loss is cross-entropy, as it showed last, by its name.

    Raises
    ------
    LieFound
        Some did.
    """
    plain = sum(shown.values())
    if plain < _FEWEST or 3 * plain < 2 * len(shown):
        return
    lies = {device: verdict.lie for device, verdict in verdicts.items()}
    if any(lies.values()):
        raise LieFound({device: lie for device, lie in lies.items() if lie})
