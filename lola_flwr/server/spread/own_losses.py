"""What the server's own head makes of hidden states under labels that it chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lola_flwr.d2ft.wire import (
    HIDDEN,
    SLOPES,
    array_of,
    digest_of,
    sizes_to_text,
    tensors_of,
)
from lola_flwr.model.example import token_ids
from lola_flwr.server.spread.audit import Recompute
from lola_flwr.server.spread.labels import LabelledLoss, nearest_labels
from lola_flwr.server.spread.losses import OwnLosses
from lola_flwr.server.spread.model import SpreadModel
from lola_flwr.server.spread.verdicts import Verdict
from lola_flwr.wire.packing import GRADIENTS, VALUES

# Labels that are looked at for each micro-batch; with more of them, none.
_MOST_LABELS = 10


@dataclass(frozen=True, eq=False)
class OwnHead:
    """The head of a text classifier, as devices compute losses by it.

    Parameters
    ----------
    spread
        The model.
    compute
        Computes as a device does.
    base
        The model without what wraps it.
    """

    spread: SpreadModel
    compute: Recompute
    base: Any

    @classmethod
    def of(cls, spread: SpreadModel, compute: Recompute | None) -> OwnHead | None:
        """Return the head; None if it is of something else than a text classifier."""
        base = getattr(spread.model, "get_base_model", lambda: spread.model)()
        if compute is None or not _is_text_classifier(base):
            return None
        return cls(spread, compute, base)

    def verdicts(
        self,
        received: Mapping[str, OwnLosses],
        outputs: Mapping[str, Sequence[Tensor]],
    ) -> dict[str, Verdict]:
        """Compare what owners sent with what labels would make of it.

        Parameters
        ----------
        received
            What they sent, by device id.
        outputs
            What the last layer gave for each of their micro-batches.

        Returns
        -------
        Verdicts by device id, but for those whose micro-batches weigh nothing, or for
        which all labels are the same to the head. None where the head draws dropout,
        or looks at tokens, since labels do not say what it gives then.
        """
        longest = max((x for each in outputs.values() for x in each), key=_num_tokens)
        if not self._is_fixed(longest):
            return {}
        found = {}
        for device, own in received.items():
            nearest = [
                nearest_labels(partial(self.under, hidden), self.num_labels, slopes)
                for hidden, slopes in zip(outputs[device], own.slopes, strict=True)
            ]
            known = [one for one in nearest if one is not None]
            if any(own.weights) and len(known) == len(nearest):
                found[device] = Verdict.of(own, known, self.num_labels)
        return found

    @property
    def num_labels(self) -> int:
        """Labels that there are."""
        return int(self.base.config.num_labels)

    def under(self, hidden: Tensor, labels: Tensor, draw: int = 0) -> LabelledLoss:
        """Return what comes of a micro-batch under some labels.

        Parameters
        ----------
        hidden
            What the last layer gave, [B, S, H].
        labels
            The labels, [B].
        draw
            Number of the tokens that stand in for the owner's, and of the dice: 1: half
            of the tokens are padding.
        """
        batch = {**self._tokens(hidden, padded=bool(draw)), "labels": labels}
        head = [self.spread.parameters[name] for name in self.spread.partition.head]
        task = replace(
            self.spread.task,
            kind="loss",
            numbers=str(draw),
            batch_size=len(hidden),
            sizes=sizes_to_text([hidden]),
            digest=digest_of([batch]),
        )
        config = self.base.config
        problem = config.problem_type  # which transformers guesses from the labels
        try:
            report, arrays = self.compute(
                task,
                {HIDDEN: array_of([hidden]), VALUES: array_of(head)},
                lambda number, batch_size: batch,
            )
        finally:
            config.problem_type = problem
        (slopes,) = tensors_of(arrays[SLOPES], [tuple(hidden.shape)])
        shapes = [tuple(parameter.shape) for parameter in head]
        (loss,) = np.frombuffer(report.losses, "<f4")
        return LabelledLoss(float(loss), slopes, tensors_of(arrays[GRADIENTS], shapes))

    def _is_fixed(self, hidden: Tensor) -> bool:
        """Whether nothing but hidden states and labels tells what the head gives."""
        labels = torch.zeros(len(hidden), dtype=torch.long)
        one, other = (self.under(hidden, labels, draw).slopes for draw in (0, 1))
        return torch.allclose(one, other, rtol=1e-4, atol=1e-4 * float(one.abs().max()))

    def _tokens(self, hidden: Tensor, *, padded: bool) -> dict[str, Tensor]:
        count, length, _ = hidden.shape
        ids = token_ids(self.base, length, count)
        mask = torch.ones_like(ids)
        if padded:
            mask[:, -(length // 2) :] = 0
            ids[mask == 0] = self.base.config.pad_token_id or 0
        return {"input_ids": ids, "attention_mask": mask}


def _num_tokens(hidden: Tensor) -> int:
    return hidden.shape[1]


def _is_text_classifier(base: nn.Module) -> bool:
    """Whether transformers would compute cross-entropy of integer labels for it."""
    config: Any = getattr(base, "config", None)
    return (
        type(base).__name__.endswith("ForSequenceClassification")
        and getattr(base, "main_input_name", None) == "input_ids"
        and 1 < config.num_labels <= _MOST_LABELS
        and config.problem_type in (None, "single_label_classification")
    )
