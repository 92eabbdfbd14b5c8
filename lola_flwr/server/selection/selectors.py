"""Which blocks to train in a round: methods by which some are chosen.

A `BlockSelector` is a function of the round, of what is known about the blocks, and of
a source of random generators; it keeps nothing itself, so that a resumed run chooses as
an unbroken one does. Every selector names at most ``max_blocks`` blocks, the ones that
it wants most first.

All but the first were devised for a single computer that holds the whole model, and
save memory and time there by freezing layers. Here they decide which blocks are given
out to devices; who gets them is the allocator's business.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import Protocol

import numpy as np

from lola_flwr.arrays import Float64Array
from lola_flwr.errors import UserError
from lola_flwr.server.selection.history import BlockHistory

# Gives the generator of a purpose: ``rng_for`` with the run's seed filled in.
Draw = Callable[..., np.random.Generator]


class BlockSelector(Protocol):
    """Chooses the blocks of a round."""

    def __call__(
        self, server_round: int, history: BlockHistory, max_blocks: int, draw: Draw
    ) -> tuple[int, ...]:
        """Return blocks, without repetition, the most wanted first.

        They are numbered as in the history, which may be that of some blocks only.

        Parameters
        ----------
        server_round
            Round, from 1.
        history
            What became of the blocks so far.
        max_blocks
            As many as devices can be found for, at least 1.
        draw
            Gives random generators, by purpose.
        """


@dataclass(frozen=True)
class RoundRobin:
    """The blocks that have waited longest; of equals those nearest the loss.

    Every block is trained at least once in ``ceil(N / count)`` rounds, as long as the
    updates arrive: one that is lost keeps its block waiting, and so first in line.

    Parameters
    ----------
    count
        Blocks a round.
    """

    count: int

    def __post_init__(self) -> None:
        _require_positive(count=self.count)

    def __call__(
        self, server_round: int, history: BlockHistory, max_blocks: int, draw: Draw
    ) -> tuple[int, ...]:
        """Choose the blocks of a round."""
        return _longest_waiting(history, min(self.count, max_blocks))


@dataclass(frozen=True)
class Lisa:
    """Blocks drawn at random, all alike, and kept for a period.

    Source: Pan et al., "LISA: Layerwise Importance Sampling for Memory-Efficient Large
    Language Model Fine-Tuning", arXiv:2403.17919, Algorithm 1, with its uniform
    distribution over the middle layers; embeddings stay frozen here, and the head is
    trained in every round.

    Parameters
    ----------
    count
        Blocks a period (the paper's gamma).
    period
        Rounds for which a draw is kept (the paper's K).
    """

    count: int
    period: int = 5

    def __post_init__(self) -> None:
        _require_positive(count=self.count, period=self.period)

    def __call__(
        self, server_round: int, history: BlockHistory, max_blocks: int, draw: Draw
    ) -> tuple[int, ...]:
        """Choose the blocks of a round."""
        rng = draw("lisa", (server_round - 1) // self.period)
        order = rng.permutation(history.num_blocks)
        return _as_blocks(order[: min(self.count, max_blocks)])


@dataclass(frozen=True)
class OutlierWeighted:
    """Blocks drawn in proportion to the outliers among their weights, for a period.

    Source: Li et al., "OwLore: Outlier-weighed Layerwise Sampled Low-Rank Projection
    for Memory-Efficient LLM Fine-tuning", arXiv:2405.18380: layers that hold more
    outliers are sampled more often.

    Parameters
    ----------
    count, period
        As for `Lisa`.
    weights
        What the chance of each of the model's blocks is proportional to; see
        `lola_flwr.server.selection.outliers.outlier_ratios`.
    """

    count: int
    weights: tuple[float, ...]
    period: int = 5

    def __post_init__(self) -> None:
        _require_positive(count=self.count, period=self.period)
        if not all(weight > 0 for weight in self.weights):
            raise UserError(
                f"weights={self.weights} must be positive: a block of weight 0 would "
                "never be trained."
            )

    def __call__(
        self, server_round: int, history: BlockHistory, max_blocks: int, draw: Draw
    ) -> tuple[int, ...]:
        """Choose the blocks of a round."""
        rng = draw("owlore", (server_round - 1) // self.period)
        weights = history.of_these(self.weights)
        return _drawn(rng, weights, min(self.count, max_blocks))


@dataclass(frozen=True)
class ImportanceSampled:
    """Blocks drawn by how much the loss suffers where they are damped.

    Source: Yao et al., "Layer-wise Importance Matters: Less Memory for Better
    Performance in Parameter-efficient Fine-tuning of Large Language Models" (IST),
    arXiv:2410.11772. The importance is learned by
    `lola_flwr.server.selection.importance.measure_importance`; until then all are
    alike.

    Parameters
    ----------
    count
        Blocks a round.
    """

    count: int

    def __post_init__(self) -> None:
        _require_positive(count=self.count)

    def __call__(
        self, server_round: int, history: BlockHistory, max_blocks: int, draw: Draw
    ) -> tuple[int, ...]:
        """Choose the blocks of a round."""
        rng = draw("ist", server_round)
        chance = 1 / (1 + np.exp(-history.importance))
        return _drawn(rng, chance, min(self.count, max_blocks))


@dataclass(frozen=True)
class LargestMoves:
    """The blocks that moved most, relative to their size, in their last step.

    Source: Ardakani et al., "SlimFit: Memory-Efficient Fine-Tuning of
    Transformer-based Models Using Training Dynamics", arXiv:2305.18513: the layers of
    the smallest relative update are frozen; a frozen layer keeps the value of its last
    update, and thaws when those of the others have fallen below it. A block that was
    never trained comes first.

    An optimizer that normalises its steps (AdamW) under a constant learning rate moves
    a block by about the same each time, so that frozen blocks may never thaw: let the
    rate decay, or put a `BoundedStaleness` around this.

    Parameters
    ----------
    count
        Blocks a round.
    """

    count: int

    def __post_init__(self) -> None:
        _require_positive(count=self.count)

    def __call__(
        self, server_round: int, history: BlockHistory, max_blocks: int, draw: Draw
    ) -> tuple[int, ...]:
        """Choose the blocks of a round."""
        # Of equals, the one that waited longer, then the one nearer the loss.
        order = np.lexsort(
            (
                -np.arange(history.num_blocks),
                history.last_round,
                -history.relative_move,
            )
        )
        return _as_blocks(order[: min(self.count, max_blocks)])


@dataclass(frozen=True)
class Progressive:
    """A trained part that grows, stage by stage, from the loss down to the input.

    Source: Wang et al., "ProgFed: Effective, Communication, and Computation Efficient
    Federated Learning by Progressive Training", arXiv:2110.05323. Its network grows
    from the input on, under a temporary head for each stage; a pre-trained one has all
    its layers, and here the cost of a block grows with its distance from the loss. So
    this grows from the loss down: early rounds are the cheap ones, and no temporary
    head is needed.

    Parameters
    ----------
    stage_rounds
        Rounds of a stage (the paper's T_s).
    step
        Blocks by which a stage is larger than the one before.
    """

    stage_rounds: int
    step: int = 1

    def __post_init__(self) -> None:
        _require_positive(stage_rounds=self.stage_rounds, step=self.step)

    def __call__(
        self, server_round: int, history: BlockHistory, max_blocks: int, draw: Draw
    ) -> tuple[int, ...]:
        """Choose the blocks of a round."""
        stage = 1 + (server_round - 1) // self.stage_rounds
        grown = min(stage * self.step, history.num_blocks)
        first = history.num_blocks - grown
        waiting = _longest_waiting(history, history.num_blocks)
        return tuple(block for block in waiting if block >= first)[:max_blocks]


@dataclass(frozen=True)
class BoundedStaleness:
    """Another selector's choice, in which no block waits longer than a bound.

    Blocks are trained in the order of their deadlines, but no sooner than they must:
    one is due in this round if otherwise, with ``max_blocks`` a round, some deadline
    could not be kept. The bound holds if ``N <= max_blocks * max_rounds``, and the
    updates arrive.

    Parameters
    ----------
    inner
        What chooses the other blocks.
    max_rounds
        Each block is trained at least once in so many rounds.
    """

    inner: BlockSelector
    max_rounds: int

    def __post_init__(self) -> None:
        _require_positive(max_rounds=self.max_rounds)

    def __call__(
        self, server_round: int, history: BlockHistory, max_blocks: int, draw: Draw
    ) -> tuple[int, ...]:
        """Choose the blocks of a round."""
        # Earliest deadline first. The j blocks of the earliest deadlines need j places,
        # and the rounds after this one, up to the latest of these, have this many:
        deadline = np.sort(history.last_round) + self.max_rounds
        later = np.maximum(deadline - server_round, 0) * max_blocks
        due = int((np.arange(1, deadline.size + 1) - later).max())
        must = _longest_waiting(history, min(max(due, 0), max_blocks))
        wanted = self.inner(server_round, history, max_blocks, draw)
        chosen = dict.fromkeys((*must, *wanted))
        return tuple(chosen)[: max(len(must), len(wanted))]


def _longest_waiting(history: BlockHistory, count: int) -> tuple[int, ...]:
    order = np.lexsort((-np.arange(history.num_blocks), history.last_round))
    return _as_blocks(order[:count])


def _drawn(
    rng: np.random.Generator, weights: Float64Array, count: int
) -> tuple[int, ...]:
    """Draw blocks without replacement, in proportion to their weights."""
    chance = weights / weights.sum()
    count = min(count, weights.size)
    return _as_blocks(rng.choice(weights.size, size=count, replace=False, p=chance))


def _as_blocks(indices: np.ndarray) -> tuple[int, ...]:
    return tuple(int(index) for index in indices)


def _require_positive(**values: int) -> None:
    for name, value in values.items():
        if not isinstance(value, Integral) or value < 1:
            raise UserError(f"{name}={value!r} must be a whole number of at least 1.")
