"""How many components of its adapter each device sends: the most progress a second.

Components that are left out add to the noise of a step as a smaller mini-batch does:
where the estimate's expected square is V times what it would be, the share of it that
leads on is ``1 / V`` of what it was. An optimizer that divides by the root of that
square makes a step that is the root of this share as long towards where all components
lead, and that is what such a step brings (`lola_flwr.allocation.batches` has another
power for the noise of mini-batches; of 8 components 4, 2 and 1 took 1.5, 2.1 and 2.6
times as many rounds to a target). With the matching given, device k of rank r uploads
for ``tau[k, r]`` over the whole band. That round is best whose progress less the pace
times its latency is largest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lola_flwr.allocation.inclusion import inclusion_probabilities, sampling_noise
from lola_flwr.allocation.shares import best_deadline
from lola_flwr.arrays import Float64Array, IntArray

# Power of the signal's share that a step brings.
_EXPONENT = 0.5
# Lengths of a round and prices of the band that are looked at.
_LENGTHS, _PRICES = 16, 24
# Passes over the devices that try every other rank of one of them.
_MOST_PASSES = 8


def kept_progress(square: Float64Array, rank: int) -> float:
    """Return what is left of a step's progress where some components are drawn.

    Parameters
    ----------
    square
        Expected square of each component's gradient, shape (R,).
    rank
        How many are drawn; 1.0 is left where that is all.
    """
    noise = sampling_noise(square, inclusion_probabilities(square, rank))
    return float(noise**-_EXPONENT)


@dataclass(frozen=True, eq=False, kw_only=True)
class RankProblem:
    """What each device brings and takes at each rank, in a round of a given matching.

    Parameters
    ----------
    compute_s
        Time that each device takes before it sends, seconds, shape (A,).
    full_band_upload_s
        Upload time over the whole band at each rank, lowest first, shape (A, L).
    worth
        What a step of its block brings at each rank, shape (A, L).
    constant_s
        Time that every round takes besides, seconds.
    pace
        Progress that a second brings in other rounds.
    """

    compute_s: Float64Array
    full_band_upload_s: Float64Array
    worth: Float64Array
    constant_s: float = 0.0
    pace: float = 0.0

    def gain(self, rung: IntArray) -> float:
        """Return what the round brings more than other rounds in the same time."""
        each = np.arange(rung.size)
        deadline_s = best_deadline(self.compute_s, self.full_band_upload_s[each, rung])
        brought = float(self.worth[each, rung].sum())
        return brought - self.pace * (self.constant_s + deadline_s)


def own_ranks(problem: RankProblem) -> IntArray:
    """Give each device the rank with which the round brings most for its time.

    Parameters
    ----------
    problem
        The devices, at uniform power per sub-carrier.

    Returns
    -------
    Index of each device's rank, shape (A,).

    Notes
    -----
    For a length of the round and a price of the band each device's best rank is found
    by itself; the best of all that are found so is improved by one device at a time.
    (It is a knapsack of several choices. On 300 small ones brute force found none that
    are better.)
    """
    number, rungs = problem.worth.shape
    ends = [np.full(number, rung) for rung in range(rungs)]
    shortest_s, longest_s = (
        best_deadline(problem.compute_s, problem.full_band_upload_s[:, rung])
        for rung in (0, -1)
    )
    if not longest_s:
        return np.asarray(problem.worth.argmax(axis=1))
    lengths_s = np.geomspace(shortest_s or 1e-6 * longest_s, longest_s, _LENGTHS)
    highest = float(problem.worth.max())
    prices = np.concatenate([[0.0], highest * np.geomspace(1e-3, 1e3, _PRICES)])
    found = {tuple(rung.tolist()) for rung in ends}
    for length_s in lengths_s:
        # Who has no time left needs far more than the band.
        left_s = np.maximum(length_s - problem.compute_s, 1e-12 * length_s)
        share = problem.full_band_upload_s / left_s[:, None]
        for price in prices:
            best = (problem.worth - price * share).argmax(axis=1)
            found.add(tuple(best.tolist()))
    start = max(sorted(found), key=lambda rung: problem.gain(np.array(rung)))
    return _improved(problem, np.array(start))


def _improved(problem: RankProblem, rung: IntArray) -> IntArray:
    """Return ranks that no device's other rank makes better."""
    best, gain = rung, problem.gain(rung)
    for _ in range(_MOST_PASSES):
        before = gain
        for device in range(best.size):
            for other in range(problem.worth.shape[1]):
                tried = best.copy()
                tried[device] = other
                if (found := problem.gain(tried)) > gain:
                    best, gain = tried, found
        if gain <= before:
            break
    return best
