"""What the active devices of a round bring: blocks, weights, noise, examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lola_flwr.allocation import kept_progress, progress
from lola_flwr.arrays import Float64Array, IntArray
from lola_flwr.planning.known import Known, RunStatement
from lola_flwr.planning.solution import SolvedRound
from lola_flwr.planning.timed import Trained
from lola_flwr.system.devices import DeviceProfile
from lola_flwr.system.gradient_noise import GradientNoise

# Examples that are asked of a device that does not say how many it holds, at most.
_UNTOLD = 32


@dataclass(frozen=True, eq=False)
class Parts:
    """The active devices of a round: rows and first blocks, in order of the rows.

    Parameters
    ----------
    rows, blocks
        Row and block of each, shape [A].
    weight
        What each one's step brings without the noise of its mini-batch, of what all
        blocks' do, shape [A]: a block that has not been trained for some rounds counts
        for as many, and one of which some components are sent for less.
    noise_scale
        Of its block, shape [A]; of several, their mean. Devices that train one block
        add their batches up: each is taken for one of as many parts.
    held_examples
        Examples that it holds, shape [A].
    count
        Devices that train its block, shape [A]; of several, their mean.
    own_size
        Examples that its steps are made for, shape [A]; 0 where they may be any number.
    """

    rows: IntArray
    blocks: IntArray
    weight: Float64Array
    noise_scale: Float64Array
    held_examples: IntArray
    count: IntArray
    own_size: IntArray

    @classmethod
    def of(cls, solved: SolvedRound, known: Known) -> Parts:
        """Return those of a round that is solved, by what is known before it."""
        rows, blocks = np.array([*solved.active()], np.int64).reshape(-1, 2).T
        num_blocks = solved.allocation.num_blocks
        noise_scale = noise_of(known, num_blocks)
        waited = waited_rounds(known, num_blocks)
        trained = [list(solved.stated.blocks(int(block))) for block in blocks]
        of_block = np.zeros(num_blocks, np.int64)
        for several in trained:
            of_block[several] += 1
        count = np.array([round(of_block[s].mean()) for s in trained], np.int64)
        profiles = [solved.stated.profiles[row] for row in rows]
        weight = np.array([waited[several].sum() for several in trained])
        if solved.rank is not None:
            ranks, place = np.unique(solved.rank[rows], return_inverse=True)
            kept = kept_by_rank(solved, known, ranks.tolist())
            weight = weight * kept[np.arange(rows.size), place]
        return cls(
            rows=rows,
            blocks=blocks,
            weight=weight / (count * num_blocks),
            noise_scale=np.array([noise_scale[several].mean() for several in trained])
            / count,
            held_examples=np.array([_held_examples(p) for p in profiles], np.int64),
            own_size=np.array([int(p.batch_size or 0) for p in profiles], np.int64),
            count=count,
        )

    def asked(self, run: RunStatement, batch_size: int) -> IntArray:
        """Return what devices are asked for where all have one batch, [A].

        Where batches are chosen: no more than they hold; and where steps have a size of
        their own, which they take as long for as it has, that.
        """
        if not run.allocation.batch_sizes:
            return np.full(self.rows.size, batch_size)
        largest = max(run.allocation.batch_sizes)
        size = np.where(self.own_size > 0, self.own_size.clip(max=largest), batch_size)
        return np.minimum(size, self.held_examples)

    def progress(self, batch_size: IntArray) -> float:
        """Return what the round brings with these batches, [A]."""
        return float(self.weight @ progress(batch_size, self.noise_scale))

    def trained(self, batch_size: IntArray) -> Trained:
        """Return what they train, each its block, with these batches, [A]."""
        return Trained(self.blocks, batch_size * self.count, self.weight)


def kept_by_rank(
    solved: SolvedRound, known: Known, ranks: Sequence[int]
) -> Float64Array:
    """Return what is left of each active device's step at some ranks, [A, L].

    Of a device that trains several blocks, the mean of theirs.
    """
    trained = [solved.stated.blocks(block) for _, block in solved.active()]
    squares = known.component_squares
    if squares is None:
        return np.ones((len(trained), len(ranks)))
    kept = {
        block: [kept_progress(squares[block], rank) for rank in ranks]
        for block in {block for several in trained for block in several}
    }
    return np.array([np.mean([kept[b] for b in several], 0) for several in trained])


def _held_examples(profile: DeviceProfile) -> int:
    held = profile.num_examples
    return int(profile.batch_size or _UNTOLD) if held is None else int(held)


def noise_of(known: Known, num_blocks: int) -> Float64Array:
    """Return each block's noise scale, [N]: what is assumed before any is known."""
    if known.noise_scale is None:
        return GradientNoise().scales(num_blocks)
    return known.noise_scale


def waited_rounds(known: Known, num_blocks: int) -> IntArray:
    """Return for how many rounds each block counts, [N]: those since its last one."""
    if known.rounds_since is None:
        return np.ones(num_blocks, np.int64)
    return known.rounds_since
