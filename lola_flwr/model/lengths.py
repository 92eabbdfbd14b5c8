"""Cut a mini-batch by the lengths of its examples, so that little padding is computed.

A batch of texts is padded to its longest: of SST-2's batches of 32 a third is words.
Sorted by length and cut into micro-batches, each as wide as its own longest example, it
has the same gradient, which is a mean over examples (or tokens) whatever they are
computed beside. Where a model or a loss makes a difference of it, nothing may be cut:
`lola_flwr.device.tokens` tries that.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from lola_flwr.arrays import IntArray
from lola_flwr.model.backprop import Batch, evenly
from lola_flwr.model.blocks import BlockPartition

_MASK = "attention_mask"
_FINE = (torch.float32, torch.float64)

# What a pass takes besides its tokens, in tokens: as measured on a CPU with layers of
# 32 to 768 hidden states, whose parameters grow with the square of these.
_PASS_TOKENS, _PASS_TOKENS_OF_WIDTH = 6.0, 21_000.0


@dataclass(frozen=True, eq=False)
class Padding:
    """How a batch is padded.

    Parameters
    ----------
    lengths
        Tokens of each example up to its padding, shape [B].
    width
        Tokens that all are padded to.
    on_left
        Whether padding stands in front.
    """

    lengths: IntArray
    width: int
    on_left: bool


def padding_of(batch: Batch) -> Padding | None:
    """Tell how a batch is padded, by its attention mask.

    None where it has none with an entry for each token, pads on both sides, or has an
    example of nothing but padding.
    """
    mask = batch.get(_MASK)
    if mask is None or mask.ndim != 2 or not mask.numel():
        return None
    is_word = (mask != 0).numpy(force=True)
    if not is_word.any(axis=1).all():
        return None
    width = is_word.shape[1]
    first = is_word.argmax(axis=1)
    behind = width - is_word[:, ::-1].argmax(axis=1)
    if not first.any():
        return Padding(behind, width, on_left=False)
    if (behind == width).all():
        return Padding(width - first, width, on_left=True)
    return None


def per_token(batch: Batch) -> frozenset[str]:
    """Return the names of what has an entry for each token, as the mask has.

    Numbers with a fraction are none, unless they are vectors: labels of as many classes
    as there are tokens have that shape, too.
    """
    shape = batch[_MASK].shape
    return frozenset(
        name
        for name, values in batch.items()
        if values.shape[:2] == shape
        and (name == _MASK or values.ndim > 2 or not values.is_floating_point())
    )


def pass_tokens(model: nn.Module, partition: BlockPartition) -> float:
    """Return how many tokens take as long as what a pass takes besides its tokens.

    It is a function of the model's shape, so that whatever computes a batch draws the
    same dropout. Where weights are not on a CPU, or are unpacked for every pass, it is
    not known, and infinite; so it is where they are rounded so far that it could not be
    told what depends on padding.
    """
    parameters = dict(model.named_parameters())
    if any(p.device.type != "cpu" or p.dtype not in _FINE for p in parameters.values()):
        return math.inf
    names = [name for part in (*partition.blocks, *partition.layers) for name in part]
    layers = [parameters[name] for name in names]
    size = sum(p.numel() for p in layers) / partition.num_blocks
    return _PASS_TOKENS + _PASS_TOKENS_OF_WIDTH / math.sqrt(max(size, 1.0))


def cut(
    lengths: Sequence[int] | IntArray,
    *,
    pass_tokens: float,
    most_examples: int,
    most_tokens: float = math.inf,
) -> list[int]:
    """Cut examples into runs whose padded tokens, and passes, are least.

    Parameters
    ----------
    lengths
        Tokens of each example, the longest first; shape [B].
    pass_tokens
        Tokens that a pass counts for besides its own.
    most_examples
        Most examples of a run.
    most_tokens
        Most tokens of a run, padding included, but for the first: not below the
        longest example.

    Returns
    -------
    Where the runs end, with a 0 in front.
    """
    widths = np.asarray(lengths)
    least = np.zeros(len(widths) + 1)
    begins = np.zeros(len(widths) + 1, np.int64)
    for end in range(1, len(widths) + 1):
        starts = np.arange(max(0, end - most_examples), end)
        tokens = (end - starts) * widths[starts]
        total = least[starts] + tokens + pass_tokens
        total[(starts > 0) & (tokens > most_tokens)] = np.inf
        best = int(total.argmin())
        least[end], begins[end] = total[best], starts[best]
    ends = [len(widths)]
    while ends[-1]:
        ends.append(int(begins[ends[-1]]))
    return ends[::-1]


@dataclass(frozen=True)
class ByLength:
    """Cuts mini-batches by length; a `Split` of `block_gradient`.

    Micro-batches of long examples come first. A batch that none of it would make
    smaller is cut as without it.

    Parameters
    ----------
    names
        What has an entry for each token, of which padding is cut off.
    pass_tokens
        Tokens that a pass counts for besides its own.
    """

    names: frozenset[str]
    pass_tokens: float

    def __call__(self, batch: Batch, micro_batch_size: int) -> Iterator[Batch]:
        """Cut a mini-batch into micro-batches of so many examples at most."""
        padding = padding_of(batch)
        runs = None if padding is None else self._runs(padding, micro_batch_size)
        if padding is None or runs is None:
            yield from evenly(batch, micro_batch_size)
            return
        for rows in runs:
            yield without_padding(batch, self.names, padding, rows)

    def _runs(self, padding: Padding, micro_batch_size: int) -> list[IntArray] | None:
        """Return the examples of each micro-batch, or None where nothing is saved."""
        count = len(padding.lengths)
        splits = 0 < micro_batch_size < count
        size = micro_batch_size if splits else count
        order = np.argsort(-padding.lengths, kind="stable")
        widths = padding.lengths[order]
        # The sum of gradients is there beside all passes but the first: these take half
        # of the tokens at most, unless memory was planned with that sum.
        half = size if splits else -(-count // 2)
        ends = cut(
            widths,
            pass_tokens=self.pass_tokens,
            most_examples=size,
            most_tokens=half * padding.width,
        )
        computed = sum((end - start) * widths[start] for start, end in pairwise(ends))
        further = (len(ends) - 1) - -(-count // size)
        saved = count * padding.width - computed
        if saved <= further * self.pass_tokens:
            return None
        return [np.sort(order[start:end]) for start, end in pairwise(ends)]


def without_padding(
    batch: Batch, names: Collection[str], padding: Padding, rows: IntArray
) -> dict[str, Tensor]:
    """Return some examples of a batch, as wide as the longest of them.

    Parameters
    ----------
    batch
        The batch.
    names
        What has an entry for each token.
    padding
        How the batch is padded.
    rows
        Which examples, in their order.
    """
    longest = int(padding.lengths[rows].max())
    start = padding.width - longest if padding.on_left else 0
    chosen = torch.from_numpy(rows)

    def cut_off(name: str, values: Tensor) -> Tensor:
        kept = values[chosen.to(values.device)]
        if name not in names or longest == padding.width:
            return kept
        return kept[:, start : start + longest].contiguous()

    return {name: cut_off(name, values) for name, values in batch.items()}
