"""Which devices say the same: what they have in common is more than their classes.

Mini-batches of different devices differ by chance. Beyond what the server's own
examples of some classes explain, gradients of two honest devices have nothing in common
but what their data have. Devices that work together have: a direction that they agreed
on, or a trigger that is to turn examples. Each of them may stay within what is usual;
as they repeat each other, they have one voice together [1]_.

A pair of devices is compared whenever one sends an update of a part of the model of
which the other sent one of the latest. With c the cosine, a sum follows

    s <- max(s + c - d, 0),

which stays near nothing as long as the mean of c is below d (Page's cumulative sum
[2]_), so that of most pairs nothing is kept. From 1 on the two count less, at 2 as one.

The mean of a class that is taken out is that of n examples, and all devices of the
class have in common by how much it is wrong. As that has 1 / n of an example's
variance, and a mini-batch of B has 1 / B, c is up to B / (B + n) by chance; d is more
than that. With many more examples in a mini-batch than the server has, nothing is told.

References
----------
.. [1] Fung, Yoon, Beschastnikh, "The Limitations of Federated Learning in Sybil
   Settings", RAID 2020 (FoolsGold, arXiv:1808.04866).
.. [2] Page, "Continuous Inspection Schemes", Biometrika 1954.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from lola_flwr.arrays import Float64Array
from lola_flwr.server.directions import sketch_of
from lola_flwr.server.own_examples import ExampleMean, Groups

# Mean cosine that two devices may have in common. In runs without attack no pair's mean
# was above 0.21 (a small model with Dirichlet shares, MiniLM); of "a little is enough"
# it is 0.3 to 0.6, of the head under a backdoor 0.36 (`make attacks`).
_ALLOWED = 0.25
# And by how much it may be beyond what it is by chance.
_BEYOND_CHANCE = 0.1
# At this the two are one. No sum grows beyond, so that what ends is forgotten.
_LARGEST = 2.0
# Latest updates of a part of the model that a new one is compared with.
_LATEST = 16


@dataclass(frozen=True, eq=False)
class Said:
    """Where an update of a part of the model points.

    Parameters
    ----------
    device
        Name of its device.
    sketch
        Its projection, of about one length, shape [D].
    """

    device: str
    sketch: npt.NDArray[np.int16]


@dataclass(frozen=True, eq=False)
class Likeness:
    """Which devices say the same.

    Parameters
    ----------
    latest
        What was said of each part of the model, oldest first.
    excess
        The sums of pairs that are not at nothing: by the name of one device, and by
        that of the other, which is the later of the two as texts are ordered.
    """

    latest: Mapping[int, tuple[Said, ...]] = field(default_factory=dict)
    excess: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def voice(self, device: str) -> float:
        """Return the part that a device has in a voice, 1 where it has one alone."""
        return 1.0 / (1.0 + self._others.get(device, 0.0))

    @cached_property
    def _others(self) -> Mapping[str, float]:
        """How many others each device counts as one with."""
        found: dict[str, float] = defaultdict(float)
        for one, others in self.excess.items():
            for other, total in others.items():
                found[one] += max(total - 1.0, 0.0)
                found[other] += max(total - 1.0, 0.0)
        return found

    def after(
        self,
        received: Sequence[tuple[str, Mapping[int, Float64Array]]],
        batch_size: int,
        means: Mapping[int, ExampleMean | None],
        groups: Mapping[int, Groups],
    ) -> Likeness:
        """Take in a round's updates.

        Parameters
        ----------
        received
            Names of devices, and their updates' projections by part of the model,
            shape [D].
        batch_size
            Examples of the largest mini-batch of the round.
        means
            Where the server's examples point, by part.
        groups
            Their groups, by part: what these explain is nothing that devices have in
            common. Where there is but one, classes are not known, and devices of a
            class would be taken for a gang: nothing is compared.
        """
        if any(len(of.sizes) < 3 for of in groups.values()):  # one, and all
            return self
        fewest = min((int(of.sizes.min()) for of in groups.values()), default=1)
        by_chance = batch_size / (batch_size + fewest)
        allowed = max(_ALLOWED, by_chance + _BEYOND_CHANCE)
        latest = dict(self.latest)
        excess = {one: dict(others) for one, others in self.excess.items()}
        for part, mean in means.items():
            if mean is None:
                continue
            now = [
                Said(device, drawn)
                for device, parts in received
                if part in parts and (drawn := sketch_of(parts[part])) is not None
            ]
            if not now:
                continue
            said = (*latest.get(part, ()), *now)
            sketches = np.stack([one.sketch for one in said]).astype(float)
            rest = mean.beyond(groups[part].means[:-1], sketches)
            cosines = mean.cosines(rest)
            for place, other in _pairs(said, len(now)):
                pair = said[place].device, said[other].device
                _compared(excess, pair, float(cosines[place, other]) - allowed)
            latest[part] = said[-_LATEST:]
        return Likeness(latest, {one: some for one, some in excess.items() if some})


def _pairs(said: Sequence[Said], num_new: int) -> Iterator[tuple[int, int]]:
    """Give each new one's place, and those of others' latest before it."""
    for place in range(len(said) - num_new, len(said)):
        for other in range(max(place - _LATEST, 0), place):
            if said[other].device != said[place].device:
                yield place, other


def _compared(
    excess: dict[str, dict[str, float]], pair: tuple[str, str], beyond: float
) -> None:
    """Let a pair's sum follow, by how far its cosine was beyond what is allowed."""
    first, second = sorted(pair)
    others = excess.setdefault(first, {})
    total = min(others.pop(second, 0.0) + beyond, _LARGEST)
    if total > 0:
        others[second] = total
