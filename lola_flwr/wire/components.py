"""Parts of a low-rank adapter: what a device sends of its block's gradient, if not all.

A component of an adapter of rank R is a row of every A of a block and the column of
every B beside it, of one index in all of them. The server draws which a device is to
send (`lola_flwr.allocation.inclusion`), and the assignment names them. What travels has
the shapes of an adapter of lower rank; the server puts it back in its place, multiplied
by what each component counts, beside zeros. What else belongs to the block, as DoRA's
magnitudes, travels whole, and so does the head.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lola_flwr.allocation.inclusion import drawn_components, inclusion_probabilities
from lola_flwr.arrays import Float32Array, Float32Arrays, Float64Array, squared_norm
from lola_flwr.errors import UserError
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.wire.records import Assignment, MalformedRecord

Shapes = Mapping[str, Sequence[int]]

# The factors of LoRA by peft's names: "layer.0.query.lora_A.default.weight".
_FACTOR = re.compile(r"(?:^|\.)lora_(?:embedding_)?([AB])(?:\.|$)")
# A device's text makes nobody reserve more places.
_LARGEST = 1_000_000


def component_axis(name: str) -> int | None:
    """Return along which axis a parameter's components stand; None: it has none."""
    found = _FACTOR.search(name)
    return None if found is None else "AB".index(found[1])


def full_rank(partition: BlockPartition, shapes: Shapes) -> int:
    """Return how many components the adapter of every block has.

    Raises
    ------
    UserError
        Blocks have none, or not all matrices have as many.
    """
    ranks: dict[int, str] = {}
    for block in partition.blocks:
        axes = {name: component_axis(name) for name in block}
        own = {n: shapes[n][axis] for n, axis in axes.items() if axis is not None}
        if not own:
            raise UserError(
                f"rank: {block[0]} belongs to no adapter that has one; use tuning="
                "'lora', or leave rank out."
            )
        ranks |= {rank: name for name, rank in own.items()}
    if len(ranks) > 1:
        listed = " and ".join(f"{ranks[rank]} has {rank}" for rank in sorted(ranks)[:2])
        raise UserError(
            f"rank: {listed}, and a device's rank is one for all matrices; give all of "
            "them one r (no rank_pattern), or leave rank out."
        )
    return next(iter(ranks))


def checked_rank(partition: BlockPartition, shapes: Shapes, rank: int | str) -> int:
    """Return `full_rank`; refuse that more components are to be sent.

    Raises
    ------
    UserError
        As for `full_rank`, too.
    """
    full = full_rank(partition, shapes)
    if not isinstance(rank, str) and rank > full:
        raise UserError(
            f"rank={rank} is more than the adapters' own, {full}; give at most that."
        )
    return full


def rank_ladder(full: int) -> tuple[int, ...]:
    """Return the ranks that devices may be given, lowest first: halves of halves."""
    ranks = [full]
    while ranks[-1] > 1:
        ranks.append(ranks[-1] // 2)
    return tuple(reversed(ranks))


def shapes_at_rank(partition: BlockPartition, shapes: Shapes, rank: int) -> Shapes:
    """Return the shapes of what travels, by name, of devices that send so many."""
    return {
        **shapes,
        **{
            name: _with_length(shapes[name], component_axis(name), rank)
            for block in partition.blocks
            for name in block
        },
    }


def _with_length(shape: Sequence[int], axis: int | None, length: int) -> Sequence[int]:
    if axis is None:
        return shape
    return (*shape[:axis], length, *shape[axis + 1 :])


@dataclass(frozen=True, eq=False)
class Drawn:
    """What a device is to send of each of its blocks.

    Parameters
    ----------
    components
        Indices of the components, rising, by block.
    weights
        How many times each of them counts, by block.
    """

    components: Mapping[int, tuple[int, ...]]
    weights: Mapping[int, Float64Array]

    @classmethod
    def of(
        cls, squares: Mapping[int, Float64Array], rank: int, points: Mapping[int, float]
    ) -> Drawn:
        """Draw components of some blocks.

        Parameters
        ----------
        squares
            Expected square of each component's gradient, shape [R] by block.
        rank
            How many are drawn.
        points
            A random number in [0, 1) by block.
        """
        components, weights = {}, {}
        for block, square in squares.items():
            probability = inclusion_probabilities(square, rank)
            drawn = drawn_components(probability, points[block])
            components[block] = tuple(drawn.tolist())
            weights[block] = 1.0 / probability[drawn]
        return cls(components, weights)

    def to_text(self) -> str:
        """Write the components for the wire: ``"0 3 5/1 2 7"``, a group a block."""
        groups = (self.components[block] for block in sorted(self.components))
        return "/".join(" ".join(map(str, group)) for group in groups)

    def shape(self, block: int | None, name: str, shape: Sequence[int]) -> list[int]:
        """Return the shape of what travels for a parameter of a block, or of none."""
        axis = component_axis(name)
        if block is None or axis is None:
            return [*shape]
        return [*_with_length(shape, axis, len(self.components[block]))]

    def assembled(
        self, block: int | None, name: str, part: Float32Array, shape: Sequence[int]
    ) -> tuple[Float32Array, float]:
        """Put what came for a parameter into its place.

        Returns
        -------
        An array of the parameter's shape, the expectation of which is the whole
        gradient; and an unbiased estimate of the square of the whole one's norm.
        """
        axis = component_axis(name)
        if block is None or axis is None:
            return part, squared_norm(part)
        weights = self.weights[block]
        whole: Float32Array = np.zeros(shape, np.float32)
        index = (slice(None),) * axis + (list(self.components[block]),)
        along = [-1 if n == axis else 1 for n in range(len(shape))]
        with np.errstate(over="ignore"):
            whole[index] = part * weights.astype(np.float32).reshape(along)
        return whole, float(weights @ _squares(part, axis))


def _squares(values: Float32Array, axis: int) -> Float64Array:
    """Return the sum of squares at each place along an axis."""
    rows = np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)
    return np.asarray(np.square(rows, dtype=np.float64).sum(axis=1))


def component_squares(
    gradients: Float32Arrays, names: Iterable[str], drawn: Drawn | None, block: int
) -> dict[int, float]:
    """Return the square of each component's own gradient that a device has sent.

    Parameters
    ----------
    gradients
        Its update, assembled.
    names
        Parameters of the block.
    drawn
        What it was to send; None: all.
    block
        The block.
    """
    factors = {n: axis for n in names if (axis := component_axis(n)) is not None}
    total = sum(_squares(gradients[name], axis) for name, axis in factors.items())
    square = np.asarray(total, np.float64)
    if drawn is None:
        return dict(enumerate(square.tolist()))
    sent = list(drawn.components[block])
    own = square[sent] / np.square(drawn.weights[block])
    return dict(zip(sent, own.tolist(), strict=True))


def components_of(assignment: Assignment) -> dict[int, list[int]]:
    """Return the components that an assignment names, by block; empty: all.

    Raises
    ------
    MalformedRecord
        They are not of all of its blocks, do not rise, or are no numbers.
    """
    text = assignment.components
    if text is None:
        return {}
    groups = [group.split(" ") for group in text.split("/")]
    known = all(word.isdecimal() and word.isascii() for g in groups for word in g)
    numbers = [[int(word) for word in g] for g in groups] if known else []
    if len(numbers) != len(assignment.blocks) or any(
        group != sorted({*group}) or group[-1] >= _LARGEST for group in numbers
    ):
        raise MalformedRecord(
            f"components={text[:80]!r} names no components of "
            f"{len(assignment.blocks)} blocks."
        )
    return dict(zip(assignment.blocks, numbers, strict=True))


def sent_part(
    name: str, gradient: Float32Array, components: Sequence[int] | None
) -> Float32Array:
    """Return what a device sends of a parameter's gradient.

    Parameters
    ----------
    name
        The parameter.
    gradient
        Its gradient.
    components
        Those that are asked for; None: all, or it belongs to no block.

    Raises
    ------
    UserError
        The device's adapter is of a lower rank.
    """
    axis = component_axis(name)
    if components is None or axis is None:
        return gradient
    if components[-1] >= gradient.shape[axis]:
        raise UserError(
            f"Component {components[-1]} of {name} is asked for, which has "
            f"{gradient.shape[axis]}; use the same model on server and device."
        )
    return np.ascontiguousarray(gradient.take(components, axis=axis))


def with_part(
    name: str,
    before: Float32Array,
    part: Float32Array,
    components: Sequence[int] | None,
) -> Float32Array:
    """Return an array in which some components are replaced, as `sent_part` took them.

    Parameters
    ----------
    name, components
        As for `sent_part`.
    before
        The array, of the parameter's shape.
    part
        What takes the place of its components.
    """
    axis = component_axis(name)
    if components is None or axis is None:
        return part
    whole = before.copy()
    whole[(slice(None),) * axis + ([*components],)] = part
    return whole
