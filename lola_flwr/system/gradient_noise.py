"""How noisy the gradients of blocks are, by what devices say of their mini-batches.

The gradient of b examples has the expected square ``|G|^2 + tr(Sigma) / b``: its square
over groups of a mini-batch and over all of it tells both terms (McCandlish,
Kaplan, Amodei et al., arXiv:1812.06162, appendix A.1). Their ratio, the noise scale
``tr(Sigma) / |G|^2``, is the number of examples from which on more bring little. A
single pair of squares tells it badly; it is the ratio of what is kept of many.

The noise scale grows while a model learns. Where it falls, steps are too long for the
valley that they are in: what the gradients have in common then leads from one side of
it to the other. Batches therefore follow from the largest that was measured, and steps
are shortened until it is there again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from lola_flwr.arrays import Float64Array

# Groups of a mini-batch whose squared norms tell its noise. Eight would tell it little
# better, and every group is a pass of its own.
NUM_GROUPS = 4
# What is believed before anything is known, and what that weighs, in observations of
# all blocks: so few of them may well say that there is no signal.
_ASSUMED, _ASSUMED_COUNTS = 128.0, 6.0
# Observations of a block that count: gradients change as the model learns.
_WINDOW = 24
# One of so many rounds looks at the noise of blocks of which as much is known.
_EVERY = 4
# Part of them that is left out at either end: one that is far off says nothing.
_LEFT_OUT = 0.2
# What the median of all blocks weighs in each block's own, in observations.
_COMMON_COUNTS = 6.0
# No block is believed to be so many times noisier than the median of all: who trains
# one may lie about it. Nor is any less noisy: what gradients have in common, where
# steps are too long, leads from one side of the valley to the other.
_FURTHEST = 3.0
_LARGEST = 1e5
# Examples that a rate is taken to be meant for where batches are chosen: steps by fewer
# are shorter.
_MEANT_FOR = 128.0
# No step is shortened further, whatever is said of the noise.
_SHORTEST = 0.25


def step_length(batch_size: float, noise_scale: float) -> float:
    """Return how long the step by a mini-batch is, of that which the rate is meant for.

    Of the square of a gradient of B examples ``B / (B + S)`` is signal. AdamW divides
    by the root of that square: its steps are as long however little of them leads on.
    Times the root of that share, in parts of that of 128 examples, they go as far as
    there is reason for (the square-root scaling rule of adaptive optimizers, Malladi,
    Lyu, Panigrahi, Arora, arXiv:2205.10287). No step is longer than the rate says.

    Parameters
    ----------
    batch_size
        Examples.
    noise_scale
        Noise scale of the gradient, in examples; at least 0.
    """
    share = batch_size / (batch_size + noise_scale)
    return math.sqrt(min(share * (_MEANT_FOR + noise_scale) / _MEANT_FOR, 1.0))


@dataclass(frozen=True)
class NoiseObservation:
    """Squared norms of a block's gradient over few examples and over all of a batch.

    Parameters
    ----------
    block_index
        The block.
    few_examples, few_square
        Examples of a group, and the mean of the groups' squared norms.
    examples, square
        All of them, and that of theirs.
    """

    block_index: int
    few_examples: int
    few_square: float
    examples: int
    square: float

    @property
    def signal(self) -> float:
        """Estimate of ``|G|^2``, without bias; it may be negative."""
        few, all_ = self.few_examples, self.examples
        return (all_ * self.square - few * self.few_square) / (all_ - few)

    @property
    def variance(self) -> float:
        """Estimate of ``tr(Sigma)``, without bias; it may be negative."""
        rise = 1.0 / self.few_examples - 1.0 / self.examples
        return (self.few_square - self.square) / rise


@dataclass(frozen=True)
class GradientNoise:
    """What is known of the noise of gradients.

    Parameters
    ----------
    signal, variance
        Latest estimates of ``|G|^2`` and ``tr(Sigma)``, oldest first, by block index.
    largest
        Largest noise scale of the median block so far; 0: nothing is known.
    examples
        Of how many examples each of these is: what few of them say of ``|G|^2`` is
        mostly noise.
    """

    signal: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    variance: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    largest: float = 0.0
    examples: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    def update(self, observations: Iterable[NoiseObservation]) -> GradientNoise:
        """Return what is known after some observations."""
        signal, variance = dict(self.signal), dict(self.variance)
        examples = {block: self._examples(block) for block in signal}
        for seen in observations:
            block = seen.block_index
            signal[block] = (*signal.get(block, ()), seen.signal)[-_WINDOW:]
            variance[block] = (*variance.get(block, ()), seen.variance)[-_WINDOW:]
            examples[block] = (*examples.get(block, ()), seen.examples)[-_WINDOW:]
        known = GradientNoise(signal, variance, self.largest, examples)
        return replace(known, largest=max(self.largest, known._median()))

    def _median(self) -> float:
        """Return the noise scale of the median block as it is now; 0: not known."""
        if not self.signal:
            return 0.0
        count = sum(len(kept) for kept in self.signal.values())
        inverse = count * np.median([1.0 / self.measured(n) for n in self.signal])
        inverse = (inverse + _ASSUMED_COUNTS / _ASSUMED) / (count + _ASSUMED_COUNTS)
        return float(1.0 / inverse)

    def step_factor(self) -> float:
        """Return what steps are multiplied by: less than 1 where noise has fallen.

        By the root of what is left of the largest noise scale: shorter steps no longer
        lead from one side of the valley to the other, and the noise scale rises again.
        Few observations tell of no fall: steps are as long as ever until as many are
        known of every block as count.
        """
        median = self._median()
        known = min((len(kept) for kept in self.signal.values()), default=0)
        if known < _WINDOW or not (median and self.largest):
            return 1.0
        return max(float((median / self.largest) ** 0.5), _SHORTEST)

    def is_due(self, blocks: Iterable[int], server_round: int) -> bool:
        """Tell whether a round is to look at the noise of some blocks.

        Every round is until as much is known as counts, and then every fourth: noise
        changes slowly, and a device computes in more passes to tell it.
        """
        known = min(len(self.signal.get(block, ())) for block in blocks)
        return known < _WINDOW or server_round % _EVERY == 0

    def measured(self, block_index: int) -> float:
        """Return a block's noise scale as it is measured, examples; at least 1."""
        weights = self._examples(block_index)
        signal = _middle(self.signal.get(block_index, ()), weights)
        variance = _middle(self.variance.get(block_index, ()), weights)
        if variance <= signal:
            return 1.0
        return _LARGEST if signal <= 0.0 else min(variance / signal, _LARGEST)

    def _examples(self, block_index: int) -> tuple[int, ...]:
        """Return the weights of a block's observations; earlier versions kept none."""
        count = len(self.signal.get(block_index, ()))
        return ((1,) * count + self.examples.get(block_index, ()))[-count:][:count]

    def scales(self, num_blocks: int) -> Float64Array:
        """Return the noise scale that each block's batch is to follow from, shape [N].

        The fewer observations a block has, the more it is what all have in common. It
        is the inverses that are averaged: they are linear in ``|G|^2``, which is known
        worse than ``tr(Sigma)``.
        """
        common = 1.0 / (self.largest or _ASSUMED)
        counts = np.array([len(self.signal.get(n, ())) for n in range(num_blocks)])
        own = np.array([1.0 / self.measured(n) for n in range(num_blocks)])
        inverse = (counts * own + _COMMON_COUNTS * common) / (counts + _COMMON_COUNTS)
        return np.asarray(1.0 / inverse.clip(common / _FURTHEST, common))


def _middle(values: tuple[float, ...], weights: tuple[int, ...]) -> float:
    """Return the mean of what is neither among the largest nor among the smallest."""
    if not values:
        return 0.0
    left_out = int(_LEFT_OUT * len(values))
    order = np.argsort(values)[left_out : len(values) - left_out]
    return float(np.average(np.array(values)[order], weights=np.array(weights)[order]))
