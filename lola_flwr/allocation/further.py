"""Which blocks above its own a device sends too, and how many examples for that.

Back-propagation from the loss down to a block passes through all blocks above it: their
gradients take a device a little more computation, and bandwidth. The step of a block
that several devices send is one by all their examples: where gradients are noisy, and
rounds long by what is computed, that brings more than it takes.

With the matching given, the round of devices that train their blocks up to some last
one, on so many examples each, ends as early as its best shares let it. What it brings
is the mean over the blocks of what a step of each block's examples does (`progress`).
The last blocks and the examples are found by coordinate ascent: device after device is
given what is best beside what the others have, as long as anything gains by it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lola_flwr.allocation.batches import progress
from lola_flwr.arrays import Float64Array, IntArray

# A device's batch is tried times these, in passes over the devices: far, then near.
_FACTORS = (
    2.0 ** np.array([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0]),
    2.0 ** np.array([-0.5, -0.25, 0.0, 0.25, 0.5]),
    2.0 ** np.array([-0.2, -0.1, 0.0, 0.1, 0.2]),
)
# Passes with each, at most.
_PASSES = 2
# Newton's steps to the end of a round; from the left they do not pass it.
_STEPS, _ROUNDING = 30, 1e-12


@dataclass(frozen=True, eq=False, kw_only=True)
class FurtherProblem:
    """What more devices may do in a round whose matching is given: A devices, N blocks.

    Parameters
    ----------
    first
        Block of each device, shape (A,).
    last
        The last block up to which it may send all, shape (A,).
    fixed_s
        Time that it takes whatever its batch, seconds, shape (A,).
    example_s
        Time that it computes its own block for one example, seconds, shape (A,).
    further_example_s
        Time that each block takes besides where back-propagation passes it anyway,
        seconds for one example, shape (A, N).
    upload_s
        Time to upload its own block over the whole band, seconds, shape (A,).
    further_upload_s
        Time that each block takes besides, likewise, shape (A, N).
    noise_scale, weight
        Noise scale of each block's gradient, examples, and what a step of it brings
        without noise, shape (N,).
    least, most
        Bounds of each device's batch, whole examples, shape (A,); at least 1.
    most_further
        The most examples of a device that sends more than its own block, shape (A,).
    constant_s
        Time that every round takes besides, seconds.
    pace
        Progress that a second brings in other rounds.
    """

    first: IntArray
    last: IntArray
    fixed_s: Float64Array
    example_s: Float64Array
    further_example_s: Float64Array
    upload_s: Float64Array
    further_upload_s: Float64Array
    noise_scale: Float64Array
    weight: Float64Array
    least: IntArray
    most: IntArray
    most_further: IntArray
    constant_s: float = 0.0
    pace: float = 0.0

    def examples(self, last: IntArray, batch_size: IntArray) -> Float64Array:
        """Return the examples of each block, shape (N,)."""
        blocks = np.arange(self.weight.size)
        sent = (blocks >= self.first[:, None]) & (blocks <= last[:, None])
        return np.asarray(batch_size @ sent, np.float64)

    def progress(self, examples: Float64Array) -> Float64Array:
        """Return what rounds bring with so many examples of each block, [..., N]."""
        return np.asarray(progress(examples, self.noise_scale) @ self.weight)

    def compute_s(self, last: IntArray, batch_size: IntArray) -> Float64Array:
        """Return the time that each device computes, shape (A,)."""
        each = self.example_s + _up_to(self.further_example_s, self.first, last)
        return np.asarray(self.fixed_s + each * batch_size)

    def sent_s(self, last: IntArray) -> Float64Array:
        """Return the time that each device uploads over the whole band, shape (A,)."""
        return self.upload_s + _up_to(self.further_upload_s, self.first, last)

    def gain(self, last: IntArray, batch_size: IntArray) -> float:
        """Return what the round brings more than other rounds in the same time."""
        compute_s, sent_s = self.compute_s(last, batch_size), self.sent_s(last)
        round_s = self.constant_s + float(_ends_s(compute_s[None], sent_s[None])[0])
        brought = self.progress(self.examples(last, batch_size))
        return float(brought) - self.pace * round_s


def further_blocks(
    problem: FurtherProblem, batch_size: IntArray
) -> tuple[IntArray, IntArray]:
    """Find the last blocks, and the batches, with which a round brings most.

    Parameters
    ----------
    problem
        The devices, at uniform power per sub-carrier.
    batch_size
        Examples of each device to begin with, shape (A,): within their bounds.

    Returns
    -------
    Last block and batch of each device, shape (A,) each: of no less gain than their own
    blocks alone with the batches given.
    """
    last, batch = problem.first.copy(), batch_size.copy()
    gain = problem.gain(last, batch)
    for factors in _FACTORS:
        for _ in range(_PASSES):
            before = gain
            for device in range(last.size):
                gain = _improve(problem, last, batch, device, factors, gain)
            if not gain > before:
                break
    return last, batch


def _improve(
    problem: FurtherProblem,
    last: IntArray,
    batch: IntArray,
    device: int,
    factors: Float64Array,
    gain: float,
) -> float:
    """Give one device what is best beside what the others have, in place."""
    first = int(problem.first[device])
    # A block more or less, none and all: from where it is that leads anywhere.
    near = last[device] + np.array([-1, 0, 1])
    ends = np.unique(
        [first, *near.clip(first, problem.last[device]), problem.last[device]]
    )
    sizes = np.rint(batch[device] * factors).astype(np.int64)
    most = np.where(ends > first, problem.most_further[device], problem.most[device])
    tried = np.clip(sizes[None, :], problem.least[device], most[:, None])  # [E, F]
    end = np.repeat(ends, sizes.size)
    size = tried.ravel()
    blocks = np.arange(problem.weight.size)
    sent = (blocks >= first) & (blocks <= end[:, None])  # [C, N]
    others = problem.examples(last, batch)
    others = others - batch[device] * ((blocks >= first) & (blocks <= last[device]))
    brought = problem.progress(others + size[:, None] * sent)
    compute_s = np.tile(problem.compute_s(last, batch), (end.size, 1))
    sent_s = np.tile(problem.sent_s(last), (end.size, 1))
    ups = np.cumsum(problem.further_example_s[device, first + 1 :])
    each = problem.example_s[device] + np.concatenate([[0.0], ups])[end - first]
    compute_s[:, device] = problem.fixed_s[device] + each * size
    ups = np.cumsum(problem.further_upload_s[device, first + 1 :])
    sent_s[:, device] = (
        problem.upload_s[device] + np.concatenate([[0.0], ups])[end - first]
    )
    gains = brought - problem.pace * (problem.constant_s + _ends_s(compute_s, sent_s))
    best = int(gains.argmax())
    if gains[best] > gain:
        last[device], batch[device] = end[best], size[best]
        return float(gains[best])
    return gain


def _up_to(values: Float64Array, first: IntArray, last: IntArray) -> Float64Array:
    """Return the sums over blocks behind the first, up to the last, shape (A,)."""
    blocks = np.arange(values.shape[1])
    counts = (blocks > first[:, None]) & (blocks <= last[:, None])
    return np.asarray((values * counts).sum(axis=1))


def _ends_s(compute_s: Float64Array, upload_s: Float64Array) -> Float64Array:
    """Return when rounds end at their best shares, of devices ``[C, A]``."""
    end_s = (compute_s + upload_s).max(axis=1)
    for _ in range(_STEPS):
        left_s = end_s[:, None] - compute_s
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where(upload_s > 0.0, upload_s / left_s, 0.0)
            slope = np.where(upload_s > 0.0, share / left_s, 0.0).sum(axis=1)
        excess = share.sum(axis=1)
        # Newton on 1 / sum = 1, as for one round: concave, so it comes from the left.
        step_s = excess * (excess - 1.0) / np.where(slope > 0.0, slope, np.inf)
        end_s = end_s + step_s.clip(0.0)
        if (step_s <= _ROUNDING * end_s).all():
            break
    return np.asarray(end_s)
