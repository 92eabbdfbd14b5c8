"""What a training step takes of a device's memory, and what can be done about it.

A device that is short of memory can compute the same gradient in several micro-batches,
keep the weights below its block on disk, and run the layers from its block on a second
time rather than keep their activations. Server and device choose from the same list by
the same rule, so that the server knows what the device will do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lola_flwr.arrays import BoolArray, Float64Array, IntArray
from lola_flwr.system.devices import DeviceProfile
from lola_flwr.system.gradient_noise import NUM_GROUPS

Bytes = Float64Array | float

# What Linux maps of a file where one row is read.
_MAPPED_AT_ONCE_BYTES = 1 << 16


@dataclass(frozen=True)
class Levers:
    """How a device computes a block's gradient.

    Parameters
    ----------
    micro_batch_size
        Sequences that are computed at a time; at least 1.
    stream_prefix
        Whether the layers below the block are in memory one at a time.
    recompute_suffix
        Whether the layers from the block on run again in the backward pass.
    """

    micro_batch_size: int
    stream_prefix: bool = False
    recompute_suffix: bool = False


@dataclass(frozen=True, eq=False)
class Affine:
    """Bytes that grow with the sequences of a pass.

    Parameters
    ----------
    fixed
        What any number of them takes.
    per_sequence
        What each takes besides.
    """

    fixed: Float64Array | float
    per_sequence: Float64Array | float

    @classmethod
    def through(
        cls, one: Float64Array | float, most: Float64Array | float, batch_size: int
    ) -> Affine:
        """Return the bytes between those of one sequence and those of a batch.

        A peak is a convex function of the number, and so at most this.
        """
        rise = (most - one) / (batch_size - 1) if batch_size > 1 else 0.0 * one
        return cls(one - rise, rise) if batch_size > 1 else cls(rise, one)

    def of(self, num_sequences: int) -> Float64Array | float:
        """Return the bytes of some sequences."""
        return self.fixed + num_sequences * self.per_sequence


@dataclass(frozen=True, eq=False)
class Recomputation:
    """What a step takes whose layers from the block on run twice.

    Parameters
    ----------
    further_flops
        Operations of the second run, shape [N].
    whole_bytes, pass_bytes
        As of `StepMemory`.
    """

    further_flops: Float64Array
    whole_bytes: Float64Array
    pass_bytes: Affine


@dataclass(frozen=True, eq=False)
class StepMemory:
    """What a step's parts take at its peak, bytes.

    Parameters
    ----------
    batch_size
        Sequences whose gradient is wanted.
    micro_batch_size
        Sequences that are computed at a time where the memory allows it.
    sequence_length
        Tokens of a sequence.
    layer_bytes
        Weights of each layer, shape [N].
    rest_bytes
        Weights outside the layers and the head: embeddings, of which streaming touches
        some rows.
    head_bytes
        Weights of the head.
    update_bytes
        Gradients of each block and of the head, shape [N].
    array_bytes
        The largest array of these, which is there twice while it is added to the sum of
        the micro-batches before, shape [N].
    whole_bytes
        What the step takes besides weights where the batch is computed at once,
        shape [N].
    pass_bytes
        What a pass takes besides weights and gradients, shape [N].
    working_bytes
        What the model takes below the block while it runs there and keeps nothing.
    recomputation
        Gives, when that is asked, what the step takes whose layers run twice; or None
        where they cannot.
    """

    batch_size: int
    micro_batch_size: int
    sequence_length: int
    layer_bytes: Float64Array
    rest_bytes: float
    head_bytes: float
    update_bytes: Float64Array
    array_bytes: Float64Array
    whole_bytes: Float64Array
    pass_bytes: Affine
    working_bytes: Affine
    recomputation: Callable[[], Recomputation | None] = lambda: None

    def at(self, batch_size: int) -> StepMemory:
        """Return what a step takes with a batch that is smaller, or as large.

        Peaks are convex functions of the examples, and so at most what lies between
        those of one and of all.
        """
        size = min(self.micro_batch_size, batch_size)

        def between(whole_bytes: Float64Array, pass_bytes: Affine) -> Float64Array:
            one = self.update_bytes + pass_bytes.of(1)
            rising = Affine.through(one, whole_bytes, self.micro_batch_size)
            return np.asarray(rising.of(size))

        def recomputation() -> Recomputation | None:
            found = self.recomputation()
            return found and Recomputation(
                found.further_flops * (batch_size / self.batch_size),
                between(found.whole_bytes, found.pass_bytes),
                found.pass_bytes,
            )

        return replace(
            self,
            batch_size=batch_size,
            micro_batch_size=size,
            whole_bytes=between(self.whole_bytes, self.pass_bytes),
            recomputation=recomputation,
        )

    def peak_bytes(self, levers: Levers) -> Float64Array:
        """Return the peak for each block, shape [N]."""
        size = min(levers.micro_batch_size, self.micro_batch_size)
        several = size < self.batch_size
        kept = self.recomputation() if levers.recompute_suffix else self
        if kept is None:
            return np.full(len(self.layer_bytes), np.inf)
        step = kept.whole_bytes
        if several:
            step = self.update_bytes + self.array_bytes + kept.pass_bytes.of(size)
        if not levers.stream_prefix:
            weights = self.layer_bytes.sum() + self.rest_bytes + self.head_bytes
            return np.asarray(weights + step)
        above = np.cumsum(self.layer_bytes[::-1])[::-1] + self.head_bytes
        # Before its own layers run: the sum of gradients so far, one layer below, and
        # what is mapped of the embeddings. They are unmapped before the layer runs, but
        # a kernel with large folios maps up to ten times as much for a few rows.
        tokens = size * self.sequence_length
        share = -np.expm1(-tokens * _MAPPED_AT_ONCE_BYTES / max(self.rest_bytes, 1.0))
        once = self.layer_bytes.max() + share * self.rest_bytes
        below = several * self.update_bytes + once + self.working_bytes.of(size)
        return np.asarray(above + np.maximum(step, below))

    def holds_parts(self, levers: Levers, profile: DeviceProfile, block: int) -> bool:
        """Tell whether a device may cut its batch by length, without a need for it.

        The sum of gradients is then there beside all micro-batches but the first, which
        take half of the batch at most. It has to fit where the whole batch does.
        """
        if levers.micro_batch_size < self.batch_size:
            return True  # it is cut anyway
        return self._holds(levers, profile, block, 2)

    def holds_groups(self, levers: Levers, profile: DeviceProfile, block: int) -> bool:
        """Tell whether a device may sum up groups of its batch apart, for their noise.

        Micro-batches are a group at most. The sum of its gradients is there beside that
        of the groups before.
        """
        further_bytes = self.update_bytes[block]
        return self._holds(levers, profile, block, NUM_GROUPS, further_bytes)

    def _holds(
        self,
        levers: Levers,
        profile: DeviceProfile,
        block: int,
        num_parts: int,
        further_bytes: float = 0.0,
    ) -> bool:
        """Tell whether a batch in parts, and something besides, fits as well."""
        size = min(levers.micro_batch_size, math.ceil(self.batch_size / num_parts))
        part = self.peak_bytes(replace(levers, micro_batch_size=size))[block]
        most_bytes = max(self.peak_bytes(levers)[block], profile.memory_bytes)
        return bool(part + further_bytes <= most_bytes)

    def options(
        self, *, splits: bool, streams: bool, recomputes: bool = False
    ) -> list[Levers]:
        """Return what a device can do, the fastest first.

        Parameters
        ----------
        splits
            Whether it can compute in micro-batches.
        streams
            Whether it can stream the layers below its block.
        recomputes
            Whether it can run the layers from its block on twice.
        """
        sizes = [self.micro_batch_size]
        while splits and sizes[-1] > 1:
            sizes.append(-(-sizes[-1] // 2))
        # Mapping a layer anew costs less than halving what a layer computes at a time;
        # both cost no operations, and running layers twice does.
        ways = (False, True) if streams else (False,)
        once = [Levers(size, stream) for size in sizes for stream in ways]
        twice = [replace(levers, recompute_suffix=True) for levers in once]
        return once + twice if recomputes else once

    def choose(self, profile: DeviceProfile) -> list[Levers]:
        """Return what a device does for each block: the first that its memory holds.

        Where none does it is the one that needs least.
        """
        ((_, options, _, (chosen,)),) = self._choices([profile])
        return [options[index] for index in chosen]

    def required_bytes(self, profiles: Sequence[DeviceProfile]) -> Float64Array:
        """Return the peak of each device on each block, shape [K, N]."""
        required = np.empty((len(profiles), len(self.layer_bytes)))
        for rows, _, peaks, chosen in self._choices(profiles):
            required[rows] = np.take_along_axis(peaks, chosen, axis=0)
        return required

    def further_flops(self, profiles: Sequence[DeviceProfile]) -> Float64Array:
        """Return what each device computes twice for each block, shape [K, N]."""
        further = np.zeros((len(profiles), len(self.layer_bytes)))
        for rows, options, _, chosen in self._choices(profiles):
            twice = np.array([levers.recompute_suffix for levers in options])[chosen]
            kept = self.recomputation() if twice.any() else None
            if kept is not None:
                further[rows] = np.where(twice, kept.further_flops, 0.0)
        return further

    def _choices(
        self, profiles: Sequence[DeviceProfile]
    ) -> Iterator[tuple[list[int], list[Levers], Float64Array, IntArray]]:
        """Give rows of devices with the same options [L], these, peaks and choices.

        The peaks are of shape [L, N], the choices indices of shape [k, N].
        """
        rows_of: dict[tuple[bool, bool, bool], list[int]] = {}
        for row, able in enumerate(profiles):
            key = (able.splits_batch, able.streams_prefix, able.recomputes_suffix)
            rows_of.setdefault(key, []).append(row)
        for (splits, streams, recomputes), rows in rows_of.items():
            memory_bytes = np.array([profiles[row].memory_bytes for row in rows])
            # What running layers twice takes is counted only if somebody has to.
            for twice in (False, True)[: 1 + recomputes]:
                options = self.options(splits=splits, streams=streams, recomputes=twice)
                peaks = np.stack([self.peak_bytes(levers) for levers in options])
                fits = peaks[:, None] <= memory_bytes[None, :, None]  # [L, k, N]
                if fits.any(axis=0).all():
                    break
            least = peaks.argmin(axis=0)
            chosen = np.where(fits.any(axis=0), fits.argmax(axis=0), least)
            yield rows, options, peaks, chosen


def joined_recomputation(
    step: StepMemory,
    of_most: Callable[[], Recomputation | None],
    several: BoolArray,
    update_bytes: Float64Array,
) -> Recomputation | None:
    """Return what is recomputed where some blocks are trained with others.

    Layers do not add up here: several blocks are taken for all behind the first.

    Parameters
    ----------
    step
        What each block's step takes alone.
    of_most
        Gives what is recomputed of each block with all behind it.
    several
        Blocks that are trained with others, shape [N].
    update_bytes
        Gradients of each block with these, and of the head, shape [N].
    """
    alone, most = step.recomputation(), of_most()
    if alone is None or most is None:
        return None

    def chosen(behind: Bytes, by_itself: Bytes) -> Float64Array:
        return np.where(several, behind, by_itself)

    pass_bytes = Affine(
        chosen(most.pass_bytes.fixed, alone.pass_bytes.fixed),
        chosen(most.pass_bytes.per_sequence, alone.pass_bytes.per_sequence),
    )
    whole_bytes = pass_bytes.of(step.batch_size) + update_bytes
    return replace(
        alone,
        whole_bytes=chosen(whole_bytes, alone.whole_bytes),
        pass_bytes=pass_bytes,
    )
