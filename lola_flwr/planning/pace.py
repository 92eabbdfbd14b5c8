"""How fast a run comes on: what its rounds bring over the time that they take."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

import numpy as np

from lola_flwr.allocation import progress
from lola_flwr.arrays import Float64Array

# Rounds that tell it: devices come and go.
_WINDOW = 16


@dataclass(frozen=True)
class Brought:
    """What was trained in a round, and how long that took.

    Parameters
    ----------
    blocks
        Block of each device; of several, the first.
    batch_size
        Examples that it was trained with, by all devices that have it.
    weight
        What that brings without noise.
    round_s
        Latency of the round.
    """

    blocks: tuple[int, ...]
    batch_size: tuple[int, ...]
    weight: tuple[float, ...]
    round_s: float

    def progress(self, noise_scale: Float64Array) -> float:
        """Return what it brings while the blocks' noise scales are these, [N]."""
        sizes, scales = np.array(self.batch_size), noise_scale[list(self.blocks)]
        return float(np.array(self.weight) @ progress(sizes, scales))


@dataclass(frozen=True)
class Pace:
    """What the latest rounds were.

    Parameters
    ----------
    rounds
        The rounds, oldest first.
    """

    rounds: tuple[Brought, ...] = ()

    def after(self, brought: Brought | None) -> Pace:
        """Return the pace after a round; None: nobody has said what it brings."""
        return self if brought is None else Pace((*self.rounds, brought)[-_WINDOW:])

    @property
    def usual_round_s(self) -> float | None:
        """The median of the rounds' latencies; None without rounds."""
        return median(one.round_s for one in self.rounds) if self.rounds else None

    def a_second(self, noise_scale: Float64Array) -> float | None:
        """Return the progress that a second brings as noisy as gradients are now.

        They become noisier as a model learns: what rounds brought at first, none does
        any more.

        Parameters
        ----------
        noise_scale
            Noise scale of each block, shape [N].

        Returns
        -------
        None without rounds.
        """
        total_s = sum(one.round_s for one in self.rounds)
        if not total_s > 0.0:
            return None
        return sum(one.progress(noise_scale) for one in self.rounds) / total_s
