"""What agreements with a device tell, by what those with honest devices are like."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist, fmean, median

# What an agreement still counts after another one of the same device: some 60 count.
_KEPT = 0.985
# Standard errors by which honest devices' agreements have to be above nothing.
_ERRORS = 2.0
# No single piece of evidence is stronger, for or against.
_STRONGEST = 20.0
# The least deviation of honest devices' means, as a part of m; with the server's own
# examples it is taken for that.
_LEAST_BETWEEN = 1 / 2
# Agreements of a device before it is judged by them, and devices that have some before
# any is.
FEW_AGREEMENTS, FEWEST = 4.0, 4


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

    def and_one(self, *cosines: float, share: float = 1.0) -> Agreements:
        """Take in one more, of which one or more cosines tell, or a share of one."""
        kept = _KEPT**share
        return Agreements(
            kept * self.count + share,
            kept * self.total + share * fmean(cosines),
            kept * self.squares + share * fmean(c * c for c in cosines),
        )

    @property
    def mean(self) -> float:
        """Their mean; 0 of none."""
        return self.total / self.count if self.count else 0.0

    @property
    def is_significant(self) -> bool:
        """Tell whether their mean is above nothing."""
        if not self.count:
            return False
        return _is_significant(self.mean, self.squares / self.count, [self])


@dataclass(frozen=True)
class Honest:
    """What agreements of honest devices are like.

    Parameters
    ----------
    mean, variance
        Of one agreement; a mean of 0: nothing tells honest devices from others.
    between
        Variance of the devices' own means.
    few
        Agreements of a device before it is judged by them.
    freedom
        Degrees of freedom of ``between``: of how many devices it was told, less one.
        Infinite: it was not told of them.
    """

    mean: float = 0.0
    variance: float = 0.0
    between: float = 0.0
    few: float = 0.0
    freedom: float = math.inf

    @classmethod
    def of(cls, devices: Iterable[Agreements]) -> Honest:
        """Tell it from all devices', of which more than half are honest."""
        judged = [one for one in devices if one.count]
        if len(judged) < FEWEST:
            return cls()
        variance = sum(a.squares for a in judged) / sum(a.count for a in judged)
        middle = median(a.mean for a in judged)
        if not _is_significant(middle, variance, judged):
            return cls()
        # Of a normal distribution, by what two thirds deviate at most: where classes
        # differ, half of the devices may be one side, and half the other.
        deviations = sorted(abs(a.mean - middle) for a in judged)
        place = 2 * (len(judged) - 1) // 3
        below = (place + 0.5) / len(judged)
        spread = (deviations[place] / NormalDist().inv_cdf((1 + below) / 2)) ** 2
        by_chance = variance / median(a.count for a in judged)
        between = max(spread - by_chance, (_LEAST_BETWEEN * middle) ** 2)
        return cls(middle, variance, between, FEW_AGREEMENTS, freedom=place)

    @classmethod
    def shown(cls, devices: Iterable[Agreements], own: Agreements) -> Honest:
        """Tell it from agreements with the server's examples, and of these ones.

        So it is known from the first round on, whoever is asked in it.
        """
        judged = [one for one in devices if one.count]
        if not judged or not own.count:
            return cls()
        variance = sum(a.squares for a in judged) / sum(a.count for a in judged)
        # Lest hostile devices are most of those that were asked first.
        middle = median([*(a.mean for a in judged), *[own.mean] * FEWEST])
        heard = median(a.mean for a in judged)
        if len(judged) >= FEWEST and not _is_significant(-heard, variance, judged):
            # The server's examples may agree with each other more than with the
            # devices' data. Then an honest device may well be as far below nothing as
            # these let expect of a hostile one.
            middle = min(middle, heard)
        if not _is_significant(middle, variance, [*judged, own]):
            return cls()
        return cls(middle, variance, (_LEAST_BETWEEN * middle) ** 2, 1.0)

    def log_likelihood(self, agreements: Agreements) -> float:
        """Return the logarithm of the likelihood ratio, honest to hostile."""
        if not self.mean or agreements.count < self.few:
            return 0.0
        deviation = math.sqrt(self.variance / agreements.count + self.between)
        # Means of honest devices are m and more, of hostile ones -m and less.
        above = max(self.mean + agreements.mean, 0.0) / deviation
        below = max(self.mean - agreements.mean, 0.0) / deviation
        told = self._surprise(above) - self._surprise(below)
        return max(-_STRONGEST, min(told, _STRONGEST))

    def _surprise(self, deviations: float) -> float:
        """Return by how much less likely a mean is so far out, as a logarithm.

        By Student's distribution, as ``between`` was told of few.
        """
        if math.isinf(self.freedom):
            return deviations**2 / 2
        return (self.freedom + 1) / 2 * math.log1p(deviations**2 / self.freedom)


def _is_significant(
    middle: float, variance: float, judged: Iterable[Agreements]
) -> bool:
    """Tell whether a median of devices' means is above nothing."""
    # Of a median, as of a normal distribution.
    error = math.sqrt(math.pi / 2 * variance / sum(a.count for a in judged))
    return middle >= _ERRORS * error
