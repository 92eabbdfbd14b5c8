"""Whether a device may leave padding out: tried on the model, the loss and its batch.

A batch is cut by length only where an example's part in loss and gradient depends
neither on its padding nor on what it is computed beside. That is so of most models and
losses, and not of all: convolutions read into the padding, positions may count it, a
contrastive loss compares examples, and a mean over tokens weighs otherwise than one over
examples. So a few examples of the batch are computed both ways first, in evaluation
mode: the loss, and the head's gradient, which holds all that the layers below give.
Where they differ, batches are computed as they are.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from lola_flwr.errors import reason_of
from lola_flwr.model.backprop import (
    Batch,
    BatchWeight,
    BlockGradient,
    LossFunction,
    Split,
    block_gradient,
    evenly,
)
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.model.lengths import (
    ByLength,
    Padding,
    padding_of,
    pass_tokens,
    per_token,
    without_padding,
)
from lola_flwr.model.stored_base import evaluation_mode

_logger = logging.getLogger(__name__)

# Between the same gradient computed both ways, of its largest value: in float32, and in
# roundings of a coarser type.
_ROUNDING, _ROUNDINGS = 1e-5, 4.0


@dataclass(frozen=True, eq=False)
class _Verdict:
    """What was found of a model with a loss.

    Parameters
    ----------
    loss_function, batch_weight
        The loss, and what it is a mean over.
    names
        What had an entry for each token.
    varied
        What differed between the examples that it was tried on.
    reason
        Why nothing may be left out; "" if it may.
    """

    loss_function: LossFunction
    batch_weight: BatchWeight
    names: frozenset[str]
    varied: frozenset[str]
    reason: str

    def holds_for(self, names: frozenset[str], varied: frozenset[str]) -> bool:
        """Tell whether what was tried tells of such a batch, too."""
        return bool(self.reason) or (self.names <= names and varied <= self.varied)


# The last verdict on each model: its loss is mostly the same.
_verdicts: WeakKeyDictionary[nn.Module, _Verdict] = WeakKeyDictionary()


def split_for(
    model: nn.Module,
    partition: BlockPartition,
    batch: Batch,
    *,
    micro_batch_size: int,
    loss_function: LossFunction,
    batch_weight: BatchWeight,
) -> Split:
    """Return how a device cuts a mini-batch: by length, where that changes nothing.

    Parameters
    ----------
    model
        The model, in memory and as it computes by itself. It stays as it is.
    partition
        Its blocks.
    batch
        The mini-batch.
    micro_batch_size
        Examples that memory holds at a time; 0: all.
    loss_function, batch_weight
        As for `block_gradient`.
    """
    padding = padding_of(batch)
    if padding is None:
        return evenly
    tokens = pass_tokens(model, partition)
    names = per_token(batch)
    split = ByLength(names, tokens)
    if not split.saves(batch, micro_batch_size):
        return evenly
    parts = _parts(batch, names, padding)
    varied = frozenset(name for name, rows in parts.items() if len({*rows}) > 1)
    verdict = _verdicts.get(model)
    if (
        verdict is None
        or verdict.loss_function is not loss_function
        or verdict.batch_weight is not batch_weight
        or not verdict.holds_for(names, varied)
    ):
        rows = _telling(parts, padding)
        chosen = torch.from_numpy(rows)
        probe = {name: values[chosen] for name, values in batch.items()}
        reason = _difference(
            model, partition, probe, names, loss_function, batch_weight
        )
        verdict = _Verdict(loss_function, batch_weight, names, varied, reason)
        _verdicts[model] = verdict
        if reason:
            _logger.warning(
                "Batches are computed with their padding: %s %s if examples are "
                "computed apart and without it",
                type(model).__name__,
                reason,
            )
    if verdict.reason:
        return evenly
    return ByLength(verdict.names, tokens)


def _parts(
    batch: Batch, names: frozenset[str], padding: Padding
) -> dict[str, list[bytes]]:
    """Return, by name, what may tell examples' parts in a loss apart.

    Of what has an entry for each token it is how many differ from the padding's; of all
    else, the values.
    """
    shortest = int(padding.lengths.argmin())
    found = {}
    for name, values in batch.items():
        rows = values.detach().cpu()
        if name in names:
            pad = rows[shortest, 0 if padding.on_left else -1]
            rows = (rows != pad).flatten(1).sum(dim=1)
        found[name] = [row.tobytes() for row in _bytes(rows)]
    return found


def _bytes(values: Tensor) -> np.ndarray[Any, Any]:
    rows = values.contiguous().reshape(len(values), -1)
    return rows.view(torch.uint8).numpy()


def _telling(
    parts: Mapping[str, Sequence[bytes]], padding: Padding
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Choose few examples between which all differs that differs between any.

    The longest and the shortest are among them, and of the others short ones.
    """
    order = np.argsort(padding.lengths, kind="stable")
    chosen = {int(order[0]), int(order[-1])}
    for rows in parts.values():
        (first, *others) = {rows[row] for row in chosen}
        if others:
            continue
        chosen.update([int(row) for row in order if rows[row] != first][:1])
    return np.array(sorted(chosen))


def _difference(
    model: nn.Module,
    partition: BlockPartition,
    probe: Batch,
    names: frozenset[str],
    loss_function: LossFunction,
    batch_weight: BatchWeight,
) -> str:
    """Say what is different about examples computed apart; "" if nothing is."""

    def each_apart(batch: Batch, _: int) -> Iterator[Batch]:
        padding = padding_of(batch)
        assert padding is not None
        for row in range(len(padding.lengths)):
            yield without_padding(batch, names, padding, np.array([row]))

    try:
        with torch.random.fork_rng():
            twin = _twin(model)
            evaluation_mode(twin)
            kinds = _kinds(twin)
            last = BlockPartition((partition.head or partition.blocks[-1],), (), ())
            whole, apart = (
                block_gradient(
                    twin,
                    last,
                    0,
                    probe,
                    loss_function=loss_function,
                    batch_weight=batch_weight,
                    split=split,
                )
                for split in (evenly, each_apart)
            )
            if _kinds(twin) != kinds:
                return "becomes another model"
    # A model may raise anything on what it is not made for; what it raises on the
    # batch itself, the step will.
    except Exception as error:
        return f"fails ({reason_of(error)})"
    return _unlike(whole, apart, model)


def _unlike(whole: BlockGradient, apart: BlockGradient, model: nn.Module) -> str:
    epsilons = [torch.finfo(p.dtype).eps for p in model.parameters() if _is_float(p)]
    tolerance = max(_ROUNDING, _ROUNDINGS * max(epsilons, default=0.0))
    largest = max(float(g.abs().max()) for g in whole.gradients.values())
    furthest = max(
        float((gradient - apart.gradients[name]).abs().max())
        for name, gradient in whole.gradients.items()
    )
    if not abs(apart.loss - whole.loss) <= tolerance * abs(whole.loss):
        return f"has a loss of {apart.loss:.6g} in place of {whole.loss:.6g}"
    if not furthest <= tolerance * largest or not largest:
        share = furthest / largest if largest else 1.0
        return f"has another gradient (by {share:.1g} of its largest value)"
    return ""


def _is_float(parameter: Tensor) -> bool:
    return parameter.is_floating_point() and parameter.numel() > 1


def _twin(model: nn.Module) -> nn.Module:
    """Copy a model, but for its tensors: what a short input makes of it stays there."""
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {id(tensor): tensor for tensor in tensors}
    return copy.deepcopy(model, memo)


def _kinds(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}
