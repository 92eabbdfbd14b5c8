"""How large an update of a block may be: a few times what is usual for that block."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

# Updates of a block that its usual norm is the median of. Norms change while a
# model learns: older ones say little. (On the demo's task with small batches no honest
# update of 40 rounds had 6.5 times its block's usual norm, 1 in 10 had 2.7 times.)
_WINDOW = 20
# Of which no device gives more, however often it is asked: it would else say by itself
# what is usual.
_OF_A_DEVICE = 5
# Before a block has so many, no norm of its own is unusual.
_FEWEST = 3
# An update that is so many times larger than the limit is not scaled down, but refused:
# half a step in the direction of who sends that is still half a step too many.
_REFUSED_BEYOND = 10.0
# So is, whatever is usual, one that is so many times larger than the largest norm.
_ABSURD = 1e6


@dataclass(frozen=True)
class NormLimits:
    """How large updates may be.

    Parameters
    ----------
    max_norm
        Every update whose Euclidean norm is larger is scaled down to this.
    factor
        So is, to the usual norm of its block, every one beyond this many times that.
        What is ten times as large again is refused. Infinite turns both off.
    """

    max_norm: float = 10.0
    factor: float = 3.0

    def scale(
        self, norm: float, usual_norm: float, elsewhere: float = math.inf
    ) -> float:
        """Return what an update of that norm is multiplied with; 0: it is refused.

        Parameters
        ----------
        norm
            Euclidean norm of the update.
        usual_norm
            That of its block's updates; infinite if it is not known.
        elsewhere
            That of all blocks' updates, which counts where that is not known: blocks
            differ, and nothing is refused by it.
        """
        refused = _REFUSED_BEYOND * self.factor * usual_norm
        if norm > min(refused, _ABSURD * self.max_norm):
            return 0.0
        usual = usual_norm if math.isfinite(usual_norm) else elsewhere
        if norm > self.factor * usual:
            # Who sends what is too long gains no length by it.
            return min(usual, self.max_norm) / norm
        return 1.0 if norm <= self.max_norm else self.max_norm / norm


@dataclass(frozen=True)
class NormHistory:
    """Euclidean norms of the updates received lately.

    The norms are kept as they came, of updates that were scaled down or refused, too,
    so that the limit follows where honest gradients grow; and the median of a block's
    last norms is an honest one as long as more than half of them are. Where devices
    have batches of their own, each is divided by what noise is expected to lengthen it
    by (`RoundPlan.length_by_noise`).

    Parameters
    ----------
    of_block
        Norms by block index, oldest first.
    devices
        Names of the devices that they came from; of those before, it is not known.
    """

    of_block: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    devices: Mapping[int, tuple[str, ...]] = field(default_factory=dict)

    def usual(self, block_index: int) -> float:
        """Return the usual norm of a block; infinite while too little is known."""
        return _median(self.of_block.get(block_index, ()))

    @property
    def elsewhere(self) -> float:
        """The usual norm of all blocks; infinite while too little is known.

        A first step that is far too long is not soon forgotten: an optimizer's second
        moments have it for hundreds of rounds.
        """
        return _median([norm for norms in self.of_block.values() for norm in norms])

    def after(self, received: Iterable[tuple[int, float, str]]) -> NormHistory:
        """Return the history after one round's updates: block, norm and device."""
        norms, devices = dict(self.of_block), dict(self.devices)
        for block_index, norm, device in received:
            known = norms.get(block_index, ())
            names = devices.get(block_index, ())
            names = ("",) * (len(known) - len(names)) + names
            entries = [*zip(known, names, strict=True), (norm, device)]
            own = [n for n, (_, name) in enumerate(entries) if name == device]
            for place in own[:-_OF_A_DEVICE][:1]:
                del entries[place]
            kept = entries[-_WINDOW:]
            norms[block_index] = tuple(norm for norm, _ in kept)
            devices[block_index] = tuple(name for _, name in kept)
        return NormHistory(norms, devices)


def _median(norms: Sequence[float]) -> float:
    """Return the median of some norms; infinite where it tells nothing."""
    # Of updates that were mostly zero nothing can be told, either.
    return (len(norms) >= _FEWEST and median(norms)) or math.inf
