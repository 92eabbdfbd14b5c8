"""Which tokens of a mini-batch a device computes: those that its gradient depends on.

A batch is cut by length only where an example's part in loss and gradient depends
neither on its padding nor on what it is computed beside; and the last layer is computed
for the first token alone where the head reads no other. So it is with most classifiers,
and not with all models and losses: convolutions read into the padding, positions may
count it, a contrastive loss compares examples, a mean over tokens weighs otherwise than
one over examples. A few examples of the batch are therefore computed each way first, in
evaluation mode: the loss, and the gradient of the head, which holds all that the layers
below give, and of the last layer. What makes a difference there is not done.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from lola_flwr.arrays import IntArray
from lola_flwr.d2ft.first_token import last_layer_for_first_token
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

# Between the same gradient computed both ways, of its largest value; and losses.
_ROUNDING = 1e-5


@dataclass
class CountedSplit:
    """A `Split` that counts what it gives.

    Parameters
    ----------
    split
        The split itself.
    num_tokens, num_passes
        Tokens, padding among them, of the micro-batches so far; and these.
    """

    split: Split
    num_tokens: int = 0
    num_passes: int = 0

    def __call__(self, batch: Batch, micro_batch_size: int) -> Iterator[Batch]:
        """Cut a batch, and count."""
        for part in self.split(batch, micro_batch_size):
            mask = part.get("attention_mask")
            self.num_tokens += 0 if mask is None else mask.numel()
            self.num_passes += 1
            yield part


@dataclass(frozen=True)
class Tokens:
    """Which tokens a device computes.

    Parameters
    ----------
    split
        Cuts a mini-batch into micro-batches, and padding off.
    first_alone
        Gives the context in which the last layer is computed for those tokens that are
        read.
    pass_tokens
        Tokens that a pass more counts for.
    """

    split: Split = evenly
    first_alone: Callable[[], AbstractContextManager[Any]] = nullcontext
    pass_tokens: float = 0.0

    def per_example(
        self, batch: Batch, micro_batch_size: int, counted: CountedSplit
    ) -> float | None:
        """Return how many tokens were computed for an example, on average.

        Padding that was computed is among them, and what more passes take than without
        a cut by length or in groups. None where no mask tells.
        """
        padding = padding_of(batch)
        if padding is None:
            return None
        count = len(padding.lengths)
        further = counted.num_passes - -(-count // (micro_batch_size or count))
        return float((counted.num_tokens + further * self.pass_tokens) / count)


ALL_TOKENS = Tokens()


@dataclass(frozen=True, eq=False, kw_only=True)
class Trial:
    """A model and a loss, to be tried on a few examples.

    Parameters
    ----------
    model
        The model, in memory and as it computes by itself. It stays as it is.
    partition
        Its blocks.
    loss_function, batch_weight
        As for `block_gradient`.
    """

    model: nn.Module = field(repr=False)
    partition: BlockPartition
    loss_function: LossFunction
    batch_weight: BatchWeight

    def gradient(self, model: nn.Module, batch: Batch, split: Split) -> BlockGradient:
        """Compute the gradient of the head and of the last layer, where it is one."""
        blocks = self.partition.blocks
        names = {*self.partition.head, *(blocks[-1] if len(blocks) > 1 else ())}
        tried = BlockPartition((tuple(names or blocks[-1]),), (), ())
        return block_gradient(
            model,
            tried,
            0,
            batch,
            loss_function=self.loss_function,
            batch_weight=self.batch_weight,
            split=split,
        )

    def with_padding(self, probe: Batch, names: frozenset[str]) -> str:
        """Say what is different about examples computed apart; "" if nothing is."""

        def each_apart(batch: Batch, _: int) -> Iterator[Batch]:
            padding = padding_of(batch)
            assert padding is not None
            for row in range(len(padding.lengths)):
                yield without_padding(batch, names, padding, np.array([row]))

        # What a model raises on what it is not made for is of any type; what it raises
        # on the batch itself, the step will.
        try:
            twin = _twin(self.model)
            evaluation_mode(twin)
            kinds = _kinds(twin)
            whole = self.gradient(twin, probe, evenly)
            apart = self.gradient(twin, probe, each_apart)
        except Exception as error:
            return f"fails ({reason_of(error)})"
        if _kinds(twin) != kinds:
            return "becomes another model"
        return _unlike(whole, apart)

    def reads_first_alone(self, probe: Batch) -> bool:
        """Tell whether the head reads the last layer's first token and no other."""
        modes = evaluation_mode(self.model)
        try:
            whole = self.gradient(self.model, probe, evenly)
            with last_layer_for_first_token(self.model, self.partition):
                alone = self.gradient(self.model, probe, evenly)
        # As above; mostly it is no layer of that kind.
        except Exception:
            return False
        finally:
            for module, training in modes.items():
                module.training = training
        return not _unlike(whole, alone)


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
        Why no padding may be left out; "" if it may.
    first_alone
        Whether the head reads the first token alone.
    """

    loss_function: LossFunction
    batch_weight: BatchWeight
    names: frozenset[str]
    varied: frozenset[str]
    reason: str
    first_alone: bool

    def holds_for(
        self, trial: Trial, names: frozenset[str], varied: frozenset[str]
    ) -> bool:
        """Tell whether what was tried tells of such a batch, too."""
        return (
            self.loss_function is trial.loss_function
            and self.batch_weight is trial.batch_weight
            and (bool(self.reason) or (self.names <= names and varied <= self.varied))
        )


# The last verdict on each model: its loss is mostly the same.
_verdicts: WeakKeyDictionary[nn.Module, _Verdict] = WeakKeyDictionary()


def tokens_for(
    trial: Trial, batch: Batch, *, cuts: bool = True, shortens: bool = True
) -> Tokens:
    """Return which tokens of a mini-batch a device computes.

    Parameters
    ----------
    trial
        The model and its loss.
    batch
        The mini-batch.
    cuts
        Whether it may be cut into micro-batches.
    shortens
        Whether the last layer may be computed for some of the tokens.
    """
    padding = padding_of(batch)
    if padding is None:
        return ALL_TOKENS
    model, partition = trial.model, trial.partition
    per_pass = pass_tokens(model, partition)
    if padding.lengths.sum() < per_pass:
        return ALL_TOKENS  # not worth a look
    verdict = _verdict(trial, batch, per_token(batch), padding)
    tokens = ALL_TOKENS
    if cuts and not verdict.reason:
        split = ByLength(verdict.names, per_pass)
        tokens = replace(tokens, split=split, pass_tokens=per_pass)
    if shortens and verdict.first_alone:
        alone = partial(last_layer_for_first_token, model, partition)
        tokens = replace(tokens, first_alone=alone)
    return tokens


def _verdict(
    trial: Trial, batch: Batch, names: frozenset[str], padding: Padding
) -> _Verdict:
    """Return what was found earlier, if it tells of such a batch, or find it."""
    parts = _parts(batch, names, padding)
    varied = frozenset(name for name, rows in parts.items() if len({*rows}) > 1)
    verdict = _verdicts.get(trial.model)
    if verdict is not None and verdict.holds_for(trial, names, varied):
        return verdict
    chosen = torch.from_numpy(_telling(parts, padding))
    probe = {name: values[chosen.to(values.device)] for name, values in batch.items()}
    with torch.random.fork_rng():
        reason = trial.with_padding(probe, names)
        first_alone = not reason and trial.reads_first_alone(probe)
    if reason:
        _logger.warning(
            "Batches are computed with their padding: %s %s where examples are "
            "computed apart and without it",
            type(trial.model).__name__,
            reason,
        )
    verdict = _Verdict(
        trial.loss_function, trial.batch_weight, names, varied, reason, first_alone
    )
    _verdicts[trial.model] = verdict
    return verdict


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
        rows = rows.contiguous().reshape(len(rows), -1).view(torch.uint8)
        found[name] = [row.tobytes() for row in rows.numpy()]
    return found


def _telling(parts: Mapping[str, Sequence[bytes]], padding: Padding) -> IntArray:
    """Choose few examples between which all differs that differs between any.

    The longest and the shortest are among them, and of the others short ones.
    """
    order = np.argsort(padding.lengths, kind="stable")
    chosen = {int(order[0]), int(order[-1])}
    for rows in parts.values():
        first, *others = {rows[row] for row in chosen}
        if not others:
            chosen.update([int(row) for row in order if rows[row] != first][:1])
    return np.array(sorted(chosen))


def _unlike(whole: BlockGradient, other: BlockGradient) -> str:
    """Say in what a gradient differs from another by more than rounding."""
    if not abs(other.loss - whole.loss) <= _ROUNDING * abs(whole.loss):
        return f"has a loss of {other.loss:.6g} in place of {whole.loss:.6g}"
    largest = max(float(g.abs().max()) for g in whole.gradients.values())
    furthest = max(
        float((gradient - other.gradients[name]).abs().nan_to_num(torch.inf).max())
        for name, gradient in whole.gradients.items()
    )
    if not (largest and furthest <= _ROUNDING * largest):
        return f"has another gradient (by {furthest:.1g}, of {largest:.1g} at most)"
    return ""


def _twin(model: nn.Module) -> nn.Module:
    """Copy a model, but for its tensors: what a short input makes of it stays there."""
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {id(tensor): tensor for tensor in tensors}
    return copy.deepcopy(model, memo)


def _kinds(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}
