"""What a device uploads, and how many bits of the channel that takes.

Counted is what Flower really sends: the array of encoded gradients, or one array for
each parameter where devices return weights, with the header of its format, its name,
and the records around it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from lola_flwr.errors import UserError
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.wire.codec import Codec, codec_ladder, codec_named
from lola_flwr.wire.components import shapes_at_rank
from lola_flwr.wire.npy import NPY_HEADER_BYTES
from lola_flwr.wire.packing import (
    GRADIENTS,
    MOVES,
    VALUES,
    WHOLE_CODEC,
    packed_type,
)
from lola_flwr.wire.records import PROJECTION_TYPE
from lola_flwr.wire.versions import Manifest

Shapes = Mapping[str, Sequence[int]]

# Which devices send the head's gradient, which all of them have computed: every one;
# those with the block nearest the head; or those with one block, another each round.
HeadPolicy = Literal["every", "shallowest", "rotating"]

# What Flower 1.41 adds to a reply (metadata, report, ids of its records), and to each
# array beside its name. Measured; `tests/wire/test_payload.py` compares.
_MESSAGE_BYTES = 900
_ARRAY_BYTES = 315


def array_bytes(name: str, nbytes: int) -> int:
    """Bytes that one array of ``nbytes`` takes in a message."""
    return nbytes + NPY_HEADER_BYTES + _ARRAY_BYTES + len(name)


def projections_bytes(num_directions: int) -> int:
    """Bytes of the message in which a device sends a gradient's projections."""
    return _MESSAGE_BYTES + PROJECTION_TYPE.itemsize * num_directions


@dataclass(frozen=True)
class SizesDown:
    """How large what devices are sent is.

    Parameters
    ----------
    values
        Bytes of each array of the model, by name in the order of sending.
    moves
        Bytes of the change of each, as it is encoded.
    coded
        Bytes of each array, where it travels in the codec of what comes down whole.
    by_name
        Whether each is an array of its own; else all values are in one, and all
        changes.
    """

    values: Mapping[str, int]
    moves: Mapping[str, int]
    coded: Mapping[str, int] = field(default_factory=dict)
    by_name: bool = False

    @classmethod
    def of(
        cls, arrays: Mapping[str, npt.NDArray[Any]], codec: str, *, by_name: bool
    ) -> SizesDown:
        """Return the sizes of a model's arrays, and of their changes in a codec."""
        moves, whole = codec_named(codec), codec_named(WHOLE_CODEC)
        return cls(
            {name: values.nbytes for name, values in arrays.items()},
            {name: moves.wire_type(v.shape).nbytes for name, v in arrays.items()},
            {name: whole.wire_type(v.shape).nbytes for name, v in arrays.items()},
            by_name=by_name,
        )

    def nbytes(self, manifest: Manifest | None) -> tuple[int, int]:
        """Return the bytes of values, and of changes, that a manifest says are sent.

        Without a manifest all values are.
        """
        if manifest is None:
            return sum(self.values.values()), 0
        names = [*self.values]
        sizes = self.coded if manifest.whole_codec else self.values
        return (
            sum(sizes[name] for name in manifest.sent_names(names)),
            sum(self.moves[name] for name in manifest.moved_names(names)),
        )

    def message_bytes(self, manifest: Manifest | None) -> int:
        """Return the bytes of the message that a device is sent."""
        if self.by_name:
            names = [*self.values]
            sent = names if manifest is None else manifest.sent_names(names)
            each = (array_bytes(name, self.values[name]) for name in sent)
            return _MESSAGE_BYTES + sum(each)
        total = _MESSAGE_BYTES
        for name, count in zip((VALUES, MOVES), self.nbytes(manifest), strict=True):
            total += array_bytes(name, count) if count else 0
        return total


def update_bytes(
    names: Iterable[str], shapes: Shapes, codec: Codec, *, by_name: bool = False
) -> int:
    """Bytes of the message in which a device sends some parameters' update.

    Parameters
    ----------
    names
        The parameters.
    shapes
        Shapes of the parameters, by name.
    codec
        What they travel in.
    by_name
        Whether each parameter is an array of its own.
    """
    if by_name:
        return _MESSAGE_BYTES + sum(
            array_bytes(name, codec.wire_type(shapes[name]).nbytes) for name in names
        )
    packed = packed_type(codec, [shapes[name] for name in names])
    return _MESSAGE_BYTES + array_bytes(GRADIENTS, packed.nbytes)


def payload_bits(
    partition: BlockPartition,
    shapes: Shapes,
    codec: Codec,
    sends_head: npt.NDArray[np.bool_] | None = None,
    *,
    by_name: bool = False,
    spans: Iterable[Sequence[int]] = (),
) -> npt.NDArray[np.float64]:
    """Bits that the device of each block uploads, shape [N].

    Parameters
    ----------
    partition
        The model's blocks.
    shapes
        Shapes of at least the trainable parameters, by name.
    codec
        What the gradients travel in.
    sends_head
        Whether a block's device sends the head's gradient too, shape [N] (default:
        all do).
    by_name
        Whether each parameter is an array of its own.
    spans
        Blocks that one device trains together: what it uploads is at the first of them.
    """
    head = np.ones(partition.num_blocks, bool) if sends_head is None else sends_head
    blocks = {span[0]: span for span in spans}
    return np.array(
        [
            8.0
            * update_bytes(
                partition.update_names(*blocks.get(n, (n,)), head=head[n]),
                shapes,
                codec,
                by_name=by_name,
            )
            for n in range(partition.num_blocks)
        ]
    )


@dataclass(frozen=True, eq=False)
class Payloads:
    """What the devices of one round may be told to upload.

    Parameters
    ----------
    codecs
        Names of the codecs that a device may be given, coarsest first, L of them.
    bits
        Bits that each block's device uploads in each codec, shape [L, N]; of several
        blocks, at the first.
    sends_head
        Whether a block's device sends the head's gradient too, shape [N].
    """

    codecs: tuple[str, ...]
    bits: npt.NDArray[np.float64]
    sends_head: npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class UpdateSizes:
    """How large the updates of a run's devices are.

    Parameters
    ----------
    partition
        The model's blocks.
    shapes
        Shapes of at least the trainable parameters, by name.
    codec
        Name of the codec of all devices, or ``"auto"``.
    head
        Which devices send the head's gradient.
    by_name
        Whether devices return weights, each parameter as an array of its own.
    statistics_bytes
        What every device sends besides: the running statistics of a model's layers.
    rank
        How many components of its adapter each device sends; None: it has none, or all.

    Raises
    ------
    UserError
        No such codec or policy.
    """

    partition: BlockPartition
    shapes: Shapes
    codec: str
    head: HeadPolicy
    by_name: bool = False
    statistics_bytes: int = 0
    rank: int | None = None

    def __post_init__(self) -> None:
        """Check the names: unknown ones are errors now, not in round 1."""
        self.payloads(1, np.ones(self.partition.num_blocks, bool))

    @property
    def ladder(self) -> tuple[str, ...]:
        """The codecs that devices may be given, coarsest first."""
        return codec_ladder(self.codec)

    def payloads(
        self,
        server_round: int,
        trained: npt.NDArray[np.bool_],
        spans: Collection[Sequence[int]] = (),
    ) -> Payloads:
        """Return the payloads of a round.

        Parameters
        ----------
        server_round
            Round, from 1.
        trained
            Which blocks are trained in it, shape [N].
        spans
            Blocks that one device trains together.
        """
        codecs = self.ladder
        sends_head = head_senders(self.head, server_round, trained)
        firsts = {span[0] for span in spans}
        for first, *further in spans:
            # Of blocks that others begin with, these have the head.
            alone = [block for block in further if block not in firsts]
            sends_head[first] |= sends_head[alone].any()
        if any(len(span) > 1 for span in spans):
            bits = self._bits(sends_head, spans)
        else:
            bits = np.where(sends_head, self._with_head, self._without_head)
        return Payloads(codecs, bits + 8.0 * self.statistics_bytes, sends_head)

    @cached_property
    def _sent_shapes(self) -> Shapes:
        if self.rank is None:
            return self.shapes
        return shapes_at_rank(self.partition, self.shapes, self.rank)

    @cached_property
    def _with_head(self) -> npt.NDArray[np.float64]:
        return self._bits(np.ones(self.partition.num_blocks, bool))

    @cached_property
    def _without_head(self) -> npt.NDArray[np.float64]:
        return self._bits(np.zeros(self.partition.num_blocks, bool))

    def _bits(
        self, sends_head: npt.NDArray[np.bool_], spans: Collection[Sequence[int]] = ()
    ) -> npt.NDArray[np.float64]:
        """Return the bits of each block's payload in each codec, shape [L, N]."""
        return np.array(
            [
                payload_bits(
                    self.partition,
                    self._sent_shapes,
                    codec_named(name),
                    sends_head,
                    by_name=self.by_name,
                    spans=spans,
                )
                for name in self.ladder
            ]
        )


def head_senders(
    policy: HeadPolicy, server_round: int, trained: npt.NDArray[np.bool_]
) -> npt.NDArray[np.bool_]:
    """Tell which blocks' devices send the head's gradient, shape [N].

    Parameters
    ----------
    policy
        ``"every"`` block's; that of the ``"shallowest"`` block trained this round,
        whose device computes least; or ``"rotating"`` through those trained, so that
        the head meets other devices' data.
    server_round
        Round, from 1.
    trained
        Which blocks are trained this round, shape [N].

    Raises
    ------
    UserError
        Unknown policy.
    """
    blocks = np.flatnonzero(trained)
    if policy == "every":
        chosen = blocks
    elif policy == "shallowest":
        chosen = blocks[-1:]
    elif policy == "rotating":
        chosen = blocks[[(server_round - 1) % len(blocks)]]
    else:
        raise UserError(
            f"head={policy!r} is unknown; choose from "
            f"{', '.join(map(repr, get_args(HeadPolicy)))}."
        )
    return np.isin(np.arange(trained.size), chosen)
