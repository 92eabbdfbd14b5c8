"""How far devices are trusted, by what they sent so far.

With one device a block there is nothing to compare an update with in its own round. A
device is judged by all of its updates instead: by how far their directions agreed with
those of other devices (`lola_flwr.server.directions`), and by how often they were far
longer than is usual. An honest device's agreements have a mean m > 0 where gradients
tell anything, one's that turns them round has -m. With n agreements of mean x and a
deviation s, the likelihood ratio of the two has the logarithm

    2 * m * x / (s ** 2 / n + m ** 2 / 4),

where the second term lets honest devices' own means differ by m / 2. m is the median of
all devices' means, less its standard error: where gradients tell nothing, nobody is
judged by them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import median

import xxhash

from lola_flwr.server.directions import Direction, agreements

# The model's part that is no block, by the number that stands for it.
HEAD = -1

# Updates of a block, before and behind one, that its direction is compared with.
_BESIDE = 8
# In how many directions, those of greatest variation, nothing is compared: devices
# whose classes differ, differ in these.
_LEFT_OUT, _LEFT_OUT_OF_HEAD = 3, 1
# What an agreement still counts after another one of the same device: some 60 count.
_KEPT = 0.985
# Odds that a device of which nothing is known is honest.
_ODDS = 2.0
# A device whose odds are less does not count at all.
_LEAST = 0.1
# An update may be so many times as long as is usual, before its length speaks against
# its device. One in twelve of honest ones is.
_LONG = 3.0
# No single piece of evidence is stronger, for or against.
_STRONGEST = 20.0
# Updates of a device that it cannot send again without being noticed.
_DIGESTS = 32
# Agreements of a device before it is judged by them, and devices that have some before
# any is.
_FEW_AGREEMENTS, _FEWEST = 4.0, 4


@dataclass(frozen=True)
class Agreements:
    """How far others agreed with a device.

    Parameters
    ----------
    count
        Agreements; older ones count less, here and in the sums.
    total, squares
        Their sum, and that of their squares.
    """

    count: float = 0.0
    total: float = 0.0
    squares: float = 0.0

    def and_one(self, cosine: float) -> Agreements:
        """Take in one more."""
        return Agreements(
            _KEPT * self.count + 1.0,
            _KEPT * self.total + cosine,
            _KEPT * self.squares + cosine**2,
        )

    @property
    def mean(self) -> float:
        """Their mean; 0 of none."""
        return self.total / self.count if self.count else 0.0


@dataclass(frozen=True)
class Evidence:
    """What is known of a device's updates.

    Parameters
    ----------
    blocks, head
        How far others agreed with its gradients of blocks, and with those of the head.
    lengths
        Logarithm of the likelihood ratio by the updates' lengths.
    """

    blocks: Agreements = Agreements()
    head: Agreements = Agreements()
    lengths: float = 0.0

    def agreed(self, part: int, cosine: float) -> Evidence:
        """Take in an agreement with a part of the model."""
        if part == HEAD:
            return replace(self, head=self.head.and_one(cosine))
        return replace(self, blocks=self.blocks.and_one(cosine))

    def was_long(self, times_usual: float) -> Evidence:
        """Take in how many times as long as is usual an update was."""
        # Odds of an honest one fall with the square of its length.
        told = -2.0 * math.log(max(times_usual / _LONG, 1.0))
        return replace(self, lengths=max(_KEPT * self.lengths + told, -_STRONGEST))


@dataclass(frozen=True, eq=False)
class Reputation:
    """What is known of all devices.

    Parameters
    ----------
    key
        What sketches are drawn by; 0 before there was any update.
    of_device
        Evidence by the device's name.
    digests
        Of the latest updates of each device, oldest first.
    lately
        The latest directions of each part of the model, oldest first: by the block's
        index, ``HEAD`` for the head. The last few are still being judged, and no part
        of the evidence yet.
    """

    key: int = 0
    of_device: Mapping[str, Evidence] = field(default_factory=dict)
    digests: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    lately: Mapping[int, tuple[Direction, ...]] = field(default_factory=dict)

    def weight(self, device: str) -> float:
        """Return what an update of a device counts, 0 to 1; 0: it is not used."""
        odds = _ODDS * math.exp(self.log_likelihood(device))
        return 0.0 if odds < _LEAST else min(odds, 1.0)

    def log_likelihood(self, device: str) -> float:
        """Return the logarithm of the ratio of likelihoods, honest to hostile."""
        return self._log_likelihoods.get(device, 0.0)

    def keyed(self, digests: Iterable[str]) -> Reputation:
        """Return it with a key for all sketches, drawn from the first round's updates.

        So a run can be repeated, and no device knows the key: none has seen them all.
        """
        if self.key:
            return self
        drawn = xxhash.xxh3_64_intdigest("".join(digests).encode())
        return replace(self, key=drawn or 1)

    def has_seen(self, device: str, digest: str) -> bool:
        """Tell whether one of a device's latest updates had this digest."""
        return digest in self.digests.get(device, ())

    def after_digests(self, received: Iterable[tuple[str, str]]) -> Reputation:
        """Take in the digests of devices' updates."""
        digests = dict(self.digests)
        for device, digest in received:
            before = [one for one in digests.get(device, ()) if one != digest]
            digests[device] = (*before, digest)[-_DIGESTS:]
        return replace(self, digests=digests)

    def after_directions(
        self, directions: Iterable[tuple[int, Direction]]
    ) -> Reputation:
        """Take in where a round's updates point, by part of the model.

        A direction is judged by those that came before it, and again with those that
        come after it, until they are as many.
        """
        of_part: dict[int, list[Direction]] = {}
        for part, direction in directions:
            of_part.setdefault(part, []).append(direction)
        lately, of_device = dict(self.lately), dict(self.of_device)
        for part, arrived in of_part.items():
            for start in range(0, len(arrived), _BESIDE):
                some = arrived[start : start + _BESIDE]
                before = lately.get(part, ())
                seen, first = self._judged(part, before, some)
                for one in seen[first : max(len(seen) - _BESIDE, 0)]:
                    if one.agreement is not None:
                        known = of_device.get(one.device, Evidence())
                        of_device[one.device] = known.agreed(part, one.agreement)
                lately[part] = tuple(seen[-2 * _BESIDE :])
        return replace(self, lately=lately, of_device=of_device)

    def after_lengths(self, times_usual: Iterable[tuple[str, float]]) -> Reputation:
        """Take in how many times as long as is usual devices' updates were."""
        of_device = dict(self.of_device)
        for device, times in times_usual:
            of_device[device] = of_device.get(device, Evidence()).was_long(times)
        return replace(self, of_device=of_device)

    def _judged(
        self, part: int, before: Sequence[Direction], arrived: Sequence[Direction]
    ) -> tuple[list[Direction], int]:
        """Return a part's directions, and the first whose judgement was not final."""
        seen = [*before, *arrived]
        first = max(len(before) - _BESIDE, 0)
        found = agreements(
            seen,
            [self.weight(one.device) for one in seen],
            range(first, len(seen)),
            left_out=_LEFT_OUT_OF_HEAD if part == HEAD else _LEFT_OUT,
        )
        for place, agreement in enumerate(found, first):
            seen[place] = replace(seen[place], agreement=agreement)
        return seen, first

    @cached_property
    def _log_likelihoods(self) -> Mapping[str, float]:
        """Logarithms of the likelihood ratios, by device."""
        known = dict(self.of_device)
        for part, seen in self.lately.items():
            for one in seen[-_BESIDE:]:
                if one.agreement is not None:
                    before = known.get(one.device, Evidence())
                    known[one.device] = before.agreed(part, one.agreement)
        of_blocks = _Honest.of(one.blocks for one in known.values())
        of_head = _Honest.of(one.head for one in known.values())
        found = {}
        for device, evidence in known.items():
            blocks = of_blocks.log_likelihood(evidence.blocks)
            head = of_head.log_likelihood(evidence.head)
            # Who is honest about one is not thereby so about the other.
            found[device] = evidence.lengths + min(blocks, head, blocks + head)
        return found


@dataclass(frozen=True)
class _Honest:
    """What agreements of honest devices are like.

    Parameters
    ----------
    mean, variance
        Of one agreement; a mean of 0: nothing tells honest devices from others.
    """

    mean: float
    variance: float

    @classmethod
    def of(cls, devices: Iterable[Agreements]) -> _Honest:
        """Tell it from all devices', of which more than half are honest."""
        judged = [one for one in devices if one.count]
        if len(judged) < _FEWEST:
            return cls(0.0, 0.0)
        variance = sum(a.squares for a in judged) / sum(a.count for a in judged)
        return cls(max(median(a.mean for a in judged), 0.0), variance)

    def log_likelihood(self, agreements: Agreements) -> float:
        """Return the logarithm of the likelihood ratio, honest to hostile."""
        if not self.mean or agreements.count < _FEW_AGREEMENTS:
            return 0.0
        spread = self.variance / agreements.count + self.mean**2 / 4
        told = 2 * self.mean * agreements.mean / spread
        return max(-_STRONGEST, min(told, _STRONGEST))
