"""How far devices are trusted, by what they sent so far.

With one device a block there is nothing to compare an update with in its own round. A
device is judged by all of its updates instead: by how far their directions agreed with
those of other devices (`lola_flwr.server.directions`), and by how often they were far
longer than is usual. An honest device's agreements have a mean m > 0 where gradients
tell anything, those of one that turns them round have -m. What blocks say of one
mini-batch is one agreement, as many as they are. With n agreements of mean x
the likelihood ratio of the two has the logarithm

    2 * m * x / (s ** 2 / n + t ** 2),

where s is the deviation of agreements, and t that of honest devices' means: by what two
thirds of all devices' means deviate from m at most, and at least m / 2. m is the median
of these means. (That is for many devices; of few t is not known well, and Student's
distribution takes the normal one's place.) Where it is not significant, gradients tell
nothing, and nobody is judged by them.

With examples of the server's own (`lola_flwr.server.own_examples`) it is the same, but
that t is m / 2, that one agreement tells something already, and that the server counts
as four devices, by how far its examples agree with each other: so m is known in the
first round, whoever is asked in it. (Examples may agree with each other more than with
any device's data: where the devices' own median is lower, and not below nothing by more
than chance, that is m.) What other devices send then tells nothing more,
not even where m is not significant though the examples agree with each other: a model
that leans to one class has devices agree with those of their class alone. And devices
that say the same have one voice together (`lola_flwr.server.likeness`).

Updates are compared without the directions of greatest variation, in which devices'
classes differ; where that tells nothing, as it does where noise is so small that these
are the directions of all that is to be learned, they are compared as they are. The
head, of which many devices of a round send a gradient, is judged apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import median

import xxhash

from lola_flwr.server.directions import Direction, agreements
from lola_flwr.server.likelihoods import FEW_AGREEMENTS, FEWEST, Agreements, Honest
from lola_flwr.server.likeness import Likeness
from lola_flwr.server.own_examples import Pulls

# The model's part that is no block, by the number that stands for it.
HEAD = -1
# Ways in which gradients are compared.
_KINDS = ("blocks whole", "blocks rest", "head whole", "head rest")
# And those with the server's own examples.
_SHOWN = ("blocks shown", "head shown")

# Updates of a block, before and behind one, that its direction is compared with.
_BESIDE = 8
# In how many directions, those of greatest variation, nothing is compared: devices
# whose classes differ, differ in these.
_LEFT_OUT, _LEFT_OUT_OF_HEAD = 3, 1
# Odds that a device of which nothing is known is honest.
_ODDS = 2.0
# A device whose odds are less does not count at all.
_LEAST = 0.1
# An update may be so many times as long as is usual, before its length speaks against
# its device. One in twelve of honest ones is.
_LONG = 3.0
# Beyond so many times it may as well be an accident, and speaks no more against it;
# after ten other updates little is left of it.
_LONGEST, _LENGTHS_KEPT = 6.0, 0.9
# Updates of a device that it cannot send again without being noticed.
_DIGESTS = 32
# A device that was compared less often than this, and than half as often as the median
# one, counts accordingly less.
_ENOUGH = 10.0


@dataclass(frozen=True)
class Evidence:
    """What is known of a device's updates.

    Parameters
    ----------
    agreements
        How far others agreed with its gradients: with those of blocks and of the head,
        with the whole of them and with the rest (`Direction`), by the names of these.
    lengths
        Logarithm of the likelihood ratio by the updates' lengths.
    """

    agreements: Mapping[str, Agreements] = field(default_factory=dict)
    lengths: float = 0.0

    def of_kind(self, kind: str) -> Agreements:
        """Return the agreements of a kind."""
        return self.agreements.get(kind, Agreements())

    def agreed(self, part: int, direction: Direction) -> Evidence:
        """Take in how far others agreed with a gradient of a part of the model."""
        found = dict(self.agreements)
        for how, cosine in (("whole", direction.whole), ("rest", direction.rest)):
            if cosine is not None:
                kind, share = f"{_name(part)} {how}", direction.share or 1.0
                found[kind] = self.of_kind(kind).and_one(cosine, share=share)
        return replace(self, agreements=found)

    def was_shown(self, cosines: Mapping[int, float]) -> Evidence:
        """Take in how far the server's own examples agreed with one mini-batch.

        That is one agreement about the blocks, and one about the head: a mini-batch
        that is unlike others is so at all of its blocks.
        """
        of_kind: dict[str, list[float]] = {}
        for part, cosine in cosines.items():
            of_kind.setdefault(f"{_name(part)} shown", []).append(cosine)
        found = dict(self.agreements)
        for kind, some in of_kind.items():
            found[kind] = self.of_kind(kind).and_one(*some)
        return replace(self, agreements=found)

    def was_long(self, times_usual: float) -> Evidence:
        """Take in how many times as long as is usual an update was."""
        # Odds of an honest one fall with the square of its length.
        told = -2.0 * math.log(max(min(times_usual, _LONGEST) / _LONG, 1.0))
        return replace(self, lengths=_LENGTHS_KEPT * self.lengths + told)


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
    own
        How far the server's own examples agreed with each other.
    pulls
        Where these pull at each part of the model.
    likeness
        Which devices say the same, more than these explain.
    """

    key: int = 0
    of_device: Mapping[str, Evidence] = field(default_factory=dict)
    digests: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    lately: Mapping[int, tuple[Direction, ...]] = field(default_factory=dict)
    own: Evidence = field(default_factory=Evidence)
    pulls: Mapping[int, Pulls] = field(default_factory=dict)
    likeness: Likeness = field(default_factory=Likeness)

    def weight(self, device: str) -> float:
        """Return what an update of a device counts, 0 to 1; 0: it is not used."""
        trust = self.trust(device)
        if trust < _LEAST:
            return 0.0
        return trust * self._earned(device) * self.likeness.voice(device)

    def trust(self, device: str) -> float:
        """Return the odds that a device is honest, or 1 where they are better."""
        return min(_ODDS * math.exp(self.log_likelihood(device)), 1.0)

    def _earned(self, device: str) -> float:
        """Return what a device counts for having been compared, 0 to 1.

        A newcomer counts less among devices that are known; where all are new, none
        does.
        """
        counts, enough = self._compared
        return min((counts.get(device, 0.0) + 1.0) / (enough + 1.0), 1.0)

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
                    known = of_device.get(one.device, Evidence())
                    of_device[one.device] = known.agreed(part, one)
                lately[part] = tuple(seen[-2 * _BESIDE :])
        return replace(self, lately=lately, of_device=of_device)

    def after_shown(
        self,
        shown: Mapping[str, Mapping[int, float]],
        among: Iterable[Mapping[int, float]],
    ) -> Reputation:
        """Take in how far the server's own examples agreed.

        Parameters
        ----------
        shown
            With devices' updates, by device and part of the model.
        among
            With some of each other as if these were a device's mini-batch, by part.
        """
        of_device, own = dict(self.of_device), self.own
        for device, cosines in shown.items():
            known = of_device.get(device, Evidence())
            of_device[device] = known.was_shown(cosines)
        for cosines in among:
            own = own.was_shown(cosines)
        return replace(self, of_device=of_device, own=own)

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
        weights = [self.weight(one.device) for one in seen]
        places = range(first, len(seen))
        left_out = _LEFT_OUT_OF_HEAD if part == HEAD else _LEFT_OUT
        wholes = agreements(seen, weights, places, left_out=0)
        rests = agreements(seen, weights, places, left_out=left_out)
        for place, whole, rest in zip(places, wholes, rests, strict=True):
            seen[place] = replace(seen[place], whole=whole, rest=rest)
        return seen, first

    @cached_property
    def _compared(self) -> tuple[Mapping[str, float], float]:
        """How often each device was compared, and how often is enough."""
        counts = {
            device: max(one.count for one in known.agreements.values())
            for device, known in self._known.items()
            if known.agreements
        }
        enough = median(counts.values()) / 2 if len(counts) >= FEWEST else 0.0
        # Where all are new, none is a newcomer.
        return counts, min(enough, _ENOUGH) if enough >= FEW_AGREEMENTS else 0.0

    @cached_property
    def _known(self) -> Mapping[str, Evidence]:
        """Evidence by device, what is still being judged included."""
        known = dict(self.of_device)
        for part, seen in self.lately.items():
            for one in seen[-_BESIDE:]:
                before = known.get(one.device, Evidence())
                known[one.device] = before.agreed(part, one)
        return known

    @cached_property
    def _honest(self) -> Mapping[str, Honest]:
        """What agreements of honest devices are like, by kind."""
        known = self._known.values()
        compared = {
            kind: Honest.of([one.of_kind(kind) for one in known]) for kind in _KINDS
        }
        shown = {
            kind: Honest.shown(
                [one.of_kind(kind) for one in known], self.own.of_kind(kind)
            )
            for kind in _SHOWN
        }
        return compared | shown

    @cached_property
    def _log_likelihoods(self) -> Mapping[str, float]:
        """Logarithms of the likelihood ratios, by device."""
        return {
            device: evidence.lengths
            + _by_directions(evidence, self._honest, self.own.agreements)
            for device, evidence in self._known.items()
        }


def _name(part: int) -> str:
    return "head" if part == HEAD else "blocks"


def _by_directions(
    evidence: Evidence, honest: Mapping[str, Honest], own: Mapping[str, Agreements]
) -> float:
    """Return the logarithm of the likelihood ratio by a device's agreements."""
    parts = []
    for part in ("blocks", "head"):
        shown = f"{part} shown"
        # What the server has seen itself tells more than what others send; and of whole
        # gradients those of honest devices differ where their classes do.
        kinds = (shown, f"{part} rest", f"{part} whole")
        kind = next((kind for kind in kinds if honest[kind].mean), shown)
        if kind != shown and own.get(shown, Agreements()).is_significant:
            kind = shown
        parts.append(honest[kind].log_likelihood(evidence.of_kind(kind)))
    # Who is honest about one part is not thereby so about the other.
    return min(*parts, sum(parts))
