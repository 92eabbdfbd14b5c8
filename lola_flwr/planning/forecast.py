"""What a fleet will spend until a target, by the rounds that finished runs needed.

How many rounds a model takes no plan can tell: that is measured. What a round costs on
a channel that is drawn anew each time a plan does tell. So rounds are planned for many
draws, and as many of them as runs needed are summed up, over and over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lola_flwr.arrays import Float64Array
from lola_flwr.planning.known import Known, RunStatement
from lola_flwr.planning.solution import planned_blocks, solve_round_at
from lola_flwr.randomness import rng_for
from lola_flwr.system.devices import DeviceProfile

# Rounds that are planned, and sums of them.
_PLANNED, _SUMS = 200, 2000
# Nine of ten sums are between these.
_QUANTILES = (0.05, 0.5, 0.95)


@dataclass(frozen=True)
class Range:
    """A quantity that is not certain: its median, and what nine of ten are between."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Float64Array) -> Range:
        """Return the range of some values."""
        return cls(*(float(value) for value in np.quantile(values, _QUANTILES)))


@dataclass(frozen=True)
class PlannedRounds:
    """Rounds that were planned, each with a draw of the channel.

    Parameters
    ----------
    round_s
        Latency of each, seconds.
    joules
        Energy of each; None where that of any is not known.
    coverage
        Part of the model's blocks that a round trains, mean.
    """

    round_s: Float64Array
    joules: Float64Array | None
    coverage: float


def planned_rounds(
    run: RunStatement, fleet: Sequence[DeviceProfile], count: int = _PLANNED
) -> PlannedRounds:
    """Plan rounds of a fleet, as a run's first ones.

    Parameters
    ----------
    run
        What the rounds have in common.
    fleet
        The devices, by their names.
    count
        How many rounds.

    Raises
    ------
    InfeasibleAllocation
        The devices cannot compute the blocks.
    """
    round_s, joules, trained = [], [], []
    for server_round in range(1, count + 1):
        solved = solve_round_at(run, Known.at_first(run, fleet, server_round))
        parts = planned_blocks(run, solved)
        round_s.append(solved.allocation.round_s)
        joules += [[part.joules for part in parts]]
        trained.append(len({block for part in parts for block in part.blocks}))
    known = not any(None in of_round for of_round in joules)
    return PlannedRounds(
        round_s=np.array(round_s),
        joules=np.array([sum(filter(None, j)) for j in joules]) if known else None,
        coverage=float(np.mean(trained)) / run.num_blocks,
    )


@dataclass(frozen=True)
class Forecast:
    """What it takes until a target.

    Parameters
    ----------
    rounds, wireless_s, joules
        Rounds, seconds, and energy; None where that is not known.
    """

    rounds: Range
    wireless_s: Range
    joules: Range | None


def forecast(
    planned: PlannedRounds, needed: Sequence[tuple[int, int]], *, seed: int = 0
) -> Forecast:
    """Sum planned rounds up, as many as finished runs needed.

    Parameters
    ----------
    planned
        Rounds to draw from.
    needed
        Of each run the last round whose evaluation had not reached the target, and the
        first whose had: it got there in any round after the one, as likely as in
        another.
    seed
        Seed of the draws.
    """
    rng = rng_for(seed, "forecast")
    runs = rng.integers(len(needed), size=_SUMS)
    before, there = np.array(needed).T
    rounds = rng.integers(before[runs] + 1, there[runs] + 1)
    drawn = [rng.integers(planned.round_s.size, size=count) for count in rounds]

    def summed(of_round: Float64Array) -> Range:
        return Range.of(np.array([of_round[draw].sum() for draw in drawn]))

    return Forecast(
        rounds=Range.of(rounds.astype(np.float64)),
        wireless_s=summed(planned.round_s),
        joules=None if planned.joules is None else summed(planned.joules),
    )
