"""Judge a round's updates: by their length, by repeats, and by where they point."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from lola_flwr.arrays import Float32Arrays
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.server.assembly import BlockUpdate
from lola_flwr.server.directions import Direction, projection, sketch
from lola_flwr.server.norm_limits import NormHistory, NormLimits
from lola_flwr.server.own_examples import agreement, projected_examples
from lola_flwr.server.received import UpdateRefused
from lola_flwr.server.reputation import HEAD, Reputation
from lola_flwr.server.round.plan import RoundPlan
from lola_flwr.wire.records import Assignment


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


def judged(
    partition: BlockPartition,
    plan: RoundPlan,
    updates: Mapping[str, BlockUpdate],
    norms: NormHistory,
    limits: NormLimits,
    reputation: Reputation | None,
    own_gradients: Callable[[], Iterable[Float32Arrays]] | None = None,
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
    own_gradients
        Gives the gradients of the server's own examples.
    """
    asked = {device: plan.assignments[device] for device in updates}
    names = {device: plan.profiles[device].name for device in updates}
    # As one of each of its blocks would have it.
    norm_of = {d: u.norm / math.sqrt(len(asked[d].blocks)) for d, u in updates.items()}
    kind = {device: _kind(partition, asked[device]) for device in updates}
    norms = norms.after((kind[d], norm, names[d]) for d, norm in norm_of.items())
    usual = {device: norms.usual(kind[device]) for device in updates}
    scale = {d: limits.scale(norm_of[d], usual[d]) for d in updates}
    refused = {
        device: UpdateRefused("excessive-norm", f"{updates[device].norm:g}")
        for device, factor in scale.items()
        if not factor
    }
    if reputation is not None and updates:
        digests = {device: _digest(update) for device, update in updates.items()}
        for device, update in updates.items():
            if not update.norm:
                refused[device] = UpdateRefused("all-zero", "nothing was trained")
            elif reputation.has_seen(names[device], digests[device]):
                refused[device] = UpdateRefused("replayed", "the update came before")
            elif not reputation.weight(names[device]):
                refused[device] = UpdateRefused(
                    "distrusted", "the device's updates are not as those of others"
                )
            scale[device] *= reputation.weight(names[device])
        reputation = reputation.keyed(digests.values())
        if own_gradients is not None:
            shown = _shown(partition, asked, updates, own_gradients(), reputation.key)
            reputation = reputation.after_shown(
                (names[d], part, cosine)
                for d, of_part in shown.items()
                for part, cosine in of_part.items()
            )
        reputation = reputation.after_digests(
            (names[d], digests[d]) for d in updates
        ).after_lengths((names[d], norm_of[d] / usual[d]) for d in updates)
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


def _kind(partition: BlockPartition, assignment: Assignment) -> int:
    """Return a number for updates whose norms can be compared: block, and with head."""
    without_head = not assignment.sends_head
    return assignment.block_index + partition.num_blocks * without_head


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


def _shown(
    partition: BlockPartition,
    asked: Mapping[str, Assignment],
    updates: Mapping[str, BlockUpdate],
    own: Iterable[Float32Arrays],
    key: int,
) -> dict[str, dict[int, float]]:
    """Return how far the server's examples agree with each part of the updates."""
    parts_of = {d: _parts(partition, assignment) for d, assignment in asked.items()}
    every = {
        part: names for parts in parts_of.values() for part, names in parts.items()
    }
    examples = projected_examples(own, every, key)
    return {
        device: {
            part: agreement(
                projection(updates[device].gradients, names, key), examples[part]
            )
            for part, names in parts.items()
        }
        for device, parts in parts_of.items()
    }


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
        if drawn is not None:
            yield part, Direction(device, assignment.server_round, drawn)
