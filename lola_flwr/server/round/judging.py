"""Judge a round's updates: by their length, by repeats, and by where they point."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from statistics import median_low

import numpy as np
import xxhash

from lola_flwr.arrays import Float32Arrays, Float64Array, squared_norm
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.server.assembly import BlockUpdate
from lola_flwr.server.directions import Direction, projection, sketch
from lola_flwr.server.expected_lengths import Expected, expected
from lola_flwr.server.norm_limits import NormHistory, NormLimits
from lola_flwr.server.own_examples import (
    ExampleGradients,
    ExampleMean,
    Groups,
    agreements_among,
    pulls_after,
)
from lola_flwr.server.received import UpdateRefused
from lola_flwr.server.reputation import HEAD, Reputation
from lola_flwr.server.round.plan import RoundPlan
from lola_flwr.wire.records import Assignment

_DISTRUSTED = "distrusted"
# An update is not too long if it is at most so many times as far from the mean of a
# group of the server's examples as a mini-batch of that group is.
_NEAR = 2.0


@dataclass(frozen=True, eq=False)
class OwnExamples:
    """Examples of the server's.

    Parameters
    ----------
    gradients
        Gives their gradients.
    values
        The trainable values that devices were sent.
    """

    gradients: ExampleGradients
    values: Float32Arrays

    def pulling(
        self, reputation: Reputation, partition: BlockPartition, server_round: int
    ) -> Reputation:
        """Take in where they pull in a round, at every part of the model."""
        pulls = pulls_after(
            reputation.pulls,
            self.gradients,
            self.values,
            {HEAD: partition.head, **dict(enumerate(partition.blocks))},
            server_round=server_round,
            key=reputation.key,
        )
        return replace(reputation, pulls=pulls)


@dataclass(frozen=True, kw_only=True, eq=False)
class Judgement:
    """What is made of a round's updates, all by device id.

    Parameters
    ----------
    scale
        What each update that is used is multiplied with.
    refused
        Why the others are not.
    norms
        Norms of the updates of this round and of those before.
    reputation
        How far devices are trusted after it, None if they are not judged.
    """

    scale: Mapping[str, float]
    refused: Mapping[str, UpdateRefused]
    norms: NormHistory
    reputation: Reputation | None

    @property
    def distrusted(self) -> Set[str]:
        """Devices whose updates are refused for what they sent before."""
        return {d for d, why in self.refused.items() if why.reason == _DISTRUSTED}


def judged(
    partition: BlockPartition,
    plan: RoundPlan,
    updates: Mapping[str, BlockUpdate],
    norms: NormHistory,
    limits: NormLimits,
    reputation: Reputation | None,
    own: OwnExamples | None = None,
) -> Judgement:
    """Judge a round's updates.

    Parameters
    ----------
    partition
        The model's blocks.
    plan
        What the devices were asked for.
    updates
        Gradients as they were received, by device id in the plan's order.
    norms
        Norms of the updates of the rounds before.
    limits
        How large updates may be.
    reputation
        How far devices are trusted; None: only their updates' norms are judged.
    own
        The server's own examples, if it has any.
    """
    asked = {device: plan.assignments[device] for device in updates}
    names = {device: plan.profiles[device].name for device in updates}
    beside: _Beside | None = None
    if reputation is not None and updates:
        digests = {device: _digest(update) for device, update in updates.items()}
        reputation = reputation.keyed(digests.values())
        if own is not None:
            reputation = own.pulling(reputation, partition, plan.server_round)
            beside = _Beside.of(partition, asked, updates, reputation, own)
    # As one of each of its blocks would have it, and by what noise lets it be longer.
    noisy = {device: plan.length_by_noise(device) for device in updates}
    norm_of = {
        device: {
            kind: norm / noisy[device]
            for kind, norm in _norms(partition, asked[device], update).items()
        }
        for device, update in updates.items()
    }
    norms = norms.after(
        (kind, norm, names[d]) for d, of in norm_of.items() for kind, norm in of.items()
    )
    found = {d: None if beside is None else beside.expected(d) for d in updates}
    usual = {
        d: {
            kind: _usual(found[d], norm, norms.usual(kind)) for kind, norm in of.items()
        }
        for d, of in norm_of.items()
    }
    scale = {
        d: min(
            limits.scale(
                norm * noisy[d],
                usual[d][kind] * noisy[d],
                _longest(found[d], norm, norms.elsewhere) * noisy[d],
            )
            for kind, norm in of.items()
        )
        for d, of in norm_of.items()
    }
    times_usual = {
        names[d]: max(norm / usual[d][kind] for kind, norm in of.items())
        for d, of in norm_of.items()
    }
    refused = {
        device: UpdateRefused("excessive-norm", f"{updates[device].norm:g}")
        for device, factor in scale.items()
        if not factor
    }
    if reputation is not None and updates:
        if beside is not None:
            reputation = beside.taken_in(reputation, names)
        for device, update in updates.items():
            weight = reputation.weight(names[device])
            if not update.norm:
                refused[device] = UpdateRefused("all-zero", "nothing was trained")
            elif reputation.has_seen(names[device], digests[device]):
                refused[device] = UpdateRefused("replayed", "the update came before")
            elif not weight:
                refused[device] = UpdateRefused(
                    _DISTRUSTED, "the device's updates are not as those of others"
                )
            scale[device] *= weight
        reputation = reputation.after_digests(
            (names[d], digests[d]) for d in updates
        ).after_lengths(_lengths(times_usual))
        reputation = reputation.after_directions(
            found
            for device, update in updates.items()
            for found in _directions(
                partition, asked[device], update, names[device], reputation.key
            )
        )
    return Judgement(
        scale={d: factor for d, factor in scale.items() if d not in refused},
        refused=refused,
        norms=norms,
        reputation=reputation,
    )


def _usual(found: Expected | None, norm: float, usual_norm: float) -> float:
    """Return the usual norm of updates such as one; its own, if examples have such."""
    if found is None or found.apart > _NEAR or math.isinf(usual_norm):
        return usual_norm
    return max(norm, usual_norm)


def _longest(found: Expected | None, norm: float, elsewhere: float) -> float:
    """Return how long an update may be where its block's usual norm is not known."""
    if found is None:
        return elsewhere
    return norm if found.apart <= _NEAR else min(norm / found.times_longest, elsewhere)


def _lengths(times_usual: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    """Give how many times as long updates are as in rounds before, and as others now.

    Where a model's steps have become too long, all gradients grow: that speaks against
    none of the devices.
    """
    for device, times in times_usual.items():
        others = [t for other, t in times_usual.items() if other != device]
        yield device, times / max(median_low(others), 1.0) if others else times


def _norms(
    partition: BlockPartition, assignment: Assignment, update: BlockUpdate
) -> dict[int, float]:
    """Return an update's norm as each of its blocks alone would have it.

    By a number for what can be compared: the block, and whether the head is with it.
    """
    without_head = partition.num_blocks * (not assignment.sends_head)
    first, *further = assignment.blocks
    if not further:
        return {first + without_head: update.norm}
    head = _square(update, partition.head) if assignment.sends_head else 0.0
    return {
        block + without_head: math.sqrt(_square(update, partition.blocks[block]) + head)
        for block in assignment.blocks
    }


def _square(update: BlockUpdate, names: Sequence[str]) -> float:
    """Return the squared norm of some parameters' gradients."""
    own = (update.gradients[name] for name in names if name in update.gradients)
    return sum(map(squared_norm, own))


def _digest(update: BlockUpdate) -> str:
    """Return what tells an update from all others."""
    digest = xxhash.xxh3_64()
    for name in sorted(update.gradients):
        digest.update(np.ascontiguousarray(update.gradients[name]).data)
    return digest.hexdigest()


def _parts(
    partition: BlockPartition, assignment: Assignment
) -> dict[int, Sequence[str]]:
    """Return the parameters that a device sends, by part of the model."""
    parts: dict[int, Sequence[str]] = {
        block: partition.blocks[block] for block in assignment.blocks
    }
    if assignment.sends_head:
        parts[HEAD] = partition.head
    return parts


@dataclass(frozen=True, eq=False)
class _Beside:
    """A round's updates beside the server's own examples, as projections.

    Parameters
    ----------
    updates
        By device id and part of the model, shape [D].
    examples
        Of R examples, by those parts that devices were asked for, shape [R, D].
    groups
        Their groups, by part.
    batch_sizes
        Examples of each device's mini-batch.
    """

    updates: Mapping[str, Mapping[int, Float64Array]]
    examples: Mapping[int, Float64Array]
    groups: Mapping[int, Groups]
    batch_sizes: Mapping[str, int]

    @classmethod
    def of(
        cls,
        partition: BlockPartition,
        asked: Mapping[str, Assignment],
        updates: Mapping[str, BlockUpdate],
        reputation: Reputation,
        own: OwnExamples,
    ) -> _Beside:
        """Project what devices sent as the examples are projected."""
        projected = {
            device: {
                part: projection(updates[device].gradients, names, reputation.key)
                for part, names in _parts(partition, assignment).items()
                if part in reputation.pulls
            }
            for device, assignment in asked.items()
        }
        every = sorted({part for parts in projected.values() for part in parts})
        examples = {part: reputation.pulls[part].projections for part in every}
        numbers = own.gradients.groups
        groups = {part: Groups.of(rows, numbers) for part, rows in examples.items()}
        sizes = {device: assignment.batch_size for device, assignment in asked.items()}
        return cls(projected, examples, groups, sizes)

    def expected(self, device: str) -> Expected | None:
        """Return how long a device's update is beside what the examples let expect."""
        return expected(self.updates[device], self.groups, self.batch_sizes[device])

    def taken_in(self, reputation: Reputation, names: Mapping[str, str]) -> Reputation:
        """Take in how far updates agree with the examples, and with each other.

        Parameters
        ----------
        reputation
            How far devices were trusted before.
        names
            The devices' names, by id.
        """
        means = {part: ExampleMean.of(rows) for part, rows in self.examples.items()}
        shown = {
            names[device]: {
                part: mean.agreement(projected)
                for part, projected in parts.items()
                if (mean := means[part]) is not None
            }
            for device, parts in self.updates.items()
        }
        among: list[dict[int, float]] = []
        for part, rows in self.examples.items():
            found = agreements_among(rows, min(self.batch_sizes.values()))
            for number, cosine in enumerate(found):
                if number == len(among):
                    among.append({})
                among[number][part] = cosine
        likeness = reputation.likeness.after(
            [(names[device], parts) for device, parts in self.updates.items()],
            max(self.batch_sizes.values()),
            means,
            self.groups,
        )
        return replace(reputation.after_shown(shown, among), likeness=likeness)


def _directions(
    partition: BlockPartition,
    assignment: Assignment,
    update: BlockUpdate,
    device: str,
    key: int,
) -> Iterator[tuple[int, Direction]]:
    """Give where an update points, by part of the model."""
    for part, names in _parts(partition, assignment).items():
        drawn = sketch(update.gradients, names, key)
        share = None if part == HEAD else 1.0 / len(assignment.blocks)
        if drawn is not None:
            found = Direction(device, assignment.server_round, drawn, share=share)
            yield part, found
