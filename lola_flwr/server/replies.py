"""Read the update out of a device's reply, which is never trusted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lola_flwr.arrays import Float32Array, Float32Arrays, squared_norm
from lola_flwr.errors import brief
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.model.statistics import is_plausible, statistics_names
from lola_flwr.server.assembly import BlockUpdate
from lola_flwr.server.received import (
    UpdateRefused,
    decoded,
    finite,
    not_finite,
    read_array,
    read_move,
)
from lola_flwr.server.reports import TRAINED_KINDS, checked_report
from lola_flwr.wire.codec import codec_named
from lola_flwr.wire.components import Drawn
from lola_flwr.wire.low_rank import projection_of
from lola_flwr.wire.packing import GRADIENTS, packed_type, unpack
from lola_flwr.wire.records import (
    PROJECTION_TYPE,
    Assignment,
    UpdateReport,
)
from lola_flwr.zeroth_order.directions import directions_of, estimated_gradient


@dataclass(frozen=True, eq=False)
class DeviceReply:
    """What one device sent back, unchecked.

    Parameters
    ----------
    device_id
        Who sent it, as the transport knows it.
    tensors
        Arrays in .npy format, by name, or in the order of the names.
    num_examples
        Examples that the device claims the update is over.
    report
        Its ``UpdateReport``, as a flat record. A device that knows nothing of blocks
        reports none, and returns the weights of the whole model that it was sent.
    upload_s
        Seconds from the reply's announcement to its last byte, on the server's clock;
        None where the transport does not tell.
    answered_s
        Seconds from the round's messages to the reply's last byte, likewise.
    """

    device_id: str
    tensors: Sequence[bytes] | Mapping[str, bytes]
    num_examples: object
    report: Mapping[str, object]
    upload_s: float | None = None
    answered_s: float | None = None


@dataclass(frozen=True)
class Upload:
    """What an accepted reply cost to send.

    Parameters
    ----------
    payload_bits
        Bits of its arrays, as they were serialised, or of its projections.
    upload_s
        Seconds it took; None where the transport does not tell.
    ignored_arrays
        Arrays beyond the block and the head.
    """

    payload_bits: float
    upload_s: float | None
    ignored_arrays: int

    @classmethod
    def of(cls, reply: DeviceReply, report: UpdateReport, used_arrays: int) -> Upload:
        """Measure a reply of which some arrays were used."""
        tensors = reply.tensors
        sent = list(tensors.values() if isinstance(tensors, Mapping) else tensors)
        bits = 8.0 * sum(map(len, [*sent, report.projections or b""]))
        return cls(bits, reply.upload_s, len(sent) - used_arrays)


@dataclass(frozen=True, eq=False)
class UpdateReader:
    """Reads devices' updates.

    Parameters
    ----------
    partition
        Blocks of the model.
    sent_names
        Names of the arrays that devices are sent, in that order.
    max_gradient_norm
        Largest norm of a gradient that is estimated from projections.
    example_weight
        What an example weighs at most.
    takes_weights
        Whether devices may return weights, or how far they moved, for a gradient.
    """

    partition: BlockPartition
    sent_names: Sequence[str]
    max_gradient_norm: float
    example_weight: int = 1
    takes_weights: bool = True

    def read(
        self,
        reply: DeviceReply,
        assignment: Assignment | None,
        sent: Mapping[str, npt.NDArray[Any]],
        drawn: Drawn | None = None,
    ) -> tuple[BlockUpdate, UpdateReport]:
        """Return what a reply holds, however large it is.

        Parameters
        ----------
        reply
            The reply.
        assignment
            What its device was asked for; None if for nothing.
        sent
            The arrays that were sent, by name.
        drawn
            Which components of its adapter the device was to send; None: all.

        Raises
        ------
        UpdateRefused
            The reply cannot be used.
        """
        if assignment is None:
            raise UpdateRefused("not-asked", "the device has no block this round")
        report = checked_report(
            assignment, reply.report, takes_weights=self.takes_weights
        )
        if report.update_kind == "nothing":
            raise UpdateRefused("lost-copy", "the device no longer holds its version")
        # A transport may carry a bool, a float or a list here.
        examples = reply.num_examples
        most = assignment.batch_size * self.example_weight
        if type(examples) is float and examples.is_integer():
            examples = int(examples)
        if type(examples) is not int or examples < 1:
            raise UpdateRefused(
                "wrong-examples", f"claims {brief(examples)} examples of {most}"
            )
        if report.update_kind in TRAINED_KINDS:
            examples = min(examples, most)
        elif examples > most:
            raise UpdateRefused("wrong-examples", f"claims {examples} of {most}")
        blocks = assignment.blocks
        names = self.partition.update_names(*blocks, head=assignment.sends_head)
        if report.update_kind == "zeroth-order":
            estimate = self._estimated(report, assignment, sent, names)
            return BlockUpdate(estimate, examples, zeroth_order=True), report
        if report.update_kind == "gradient":
            if drawn is not None:
                gradients, norm = self._components(
                    reply, assignment, sent, names, drawn
                )
                return BlockUpdate(gradients, examples, norm=norm), report
            gradients = self._gradients(reply, assignment, sent, names)
            return BlockUpdate(gradients, examples, norm=_norm(gradients)), report
        tensors = self._named_tensors(reply, names)
        codec = None
        if report.update_kind == "moves":
            codec = codec_named(assignment.codec)
        moves = {n: read_move(n, tensors[n], sent[n], codec) for n in names}
        norm = _norm(moves)
        damping = self._damping(len(blocks))
        if assignment.trains_all:
            damping = np.float32(1)
        for name in self.partition.update_names(*blocks, head=False):
            moves[name] = damping * moves[name]
        statistics = self._statistics(tensors, sent)
        return BlockUpdate(moves, examples, statistics, norm), report

    def _damping(self, num_trained: int) -> np.float32:
        """Return what is left of blocks' moves, which are then taken as a gradient.

        All N blocks move at once, each trained as if the others stood still: whole
        moves overshoot. 1/N is the share that a block keeps of its move where whole
        models are averaged, as FedAvg does; blocks that a device has trained together
        keep theirs together. A step of plain SGD with lr=1 is then just this; an
        optimizer that normalises its steps, such as AdamW, cancels the factor. The
        head, which all devices move, keeps their mean move, and so do blocks whose
        devices have trained all of them.
        """
        return np.float32(num_trained / self.partition.num_blocks)

    def _gradients(
        self,
        reply: DeviceReply,
        assignment: Assignment,
        sent: Mapping[str, npt.NDArray[Any]],
        names: Sequence[str],
    ) -> Float32Arrays:
        """Return the gradients that a reply's one array holds."""
        projection = projection_of(assignment)
        shapes = {name: sent[name].shape for name in names}
        if projection is None:
            return self._received(reply, assignment, shapes)
        shapes = {name: projection.shape(shape) for name, shape in shapes.items()}
        return {
            name: projection.lift(
                assignment.server_round, name, received, sent[name].shape
            )
            for name, received in self._received(reply, assignment, shapes).items()
        }

    def _components(
        self,
        reply: DeviceReply,
        assignment: Assignment,
        sent: Mapping[str, npt.NDArray[Any]],
        names: Sequence[str],
        drawn: Drawn,
    ) -> tuple[Float32Arrays, float]:
        """Return the unbiased estimate that components are of, and the whole's norm."""
        block_of = {n: b for b in assignment.blocks for n in self.partition.blocks[b]}
        whole = {name: sent[name].shape for name in names}
        parts = {n: drawn.shape(block_of.get(n), n, whole[n]) for n in names}
        gradients: dict[str, Float32Array] = {}
        total = 0.0
        for name, part in self._received(reply, assignment, parts).items():
            gradients[name], square = drawn.assembled(
                block_of.get(name), name, part, whole[name]
            )
            # What a component counts may have made it too large.
            finite(name, gradients[name])
            total += square
        return gradients, math.sqrt(total)

    def _received(
        self,
        reply: DeviceReply,
        assignment: Assignment,
        shapes: Mapping[str, Sequence[int]],
    ) -> dict[str, Float32Array]:
        """Return what a reply's one array holds, by name."""
        codec = codec_named(assignment.codec)
        data = self._named_tensors(reply, (GRADIENTS,))[GRADIENTS]
        packed = read_array(GRADIENTS, data, *packed_type(codec, shapes.values()))
        return {
            name: decoded(name, wire, shapes[name], codec)
            for name, wire in unpack(packed, codec, shapes).items()
        }

    def _estimated(
        self,
        report: UpdateReport,
        assignment: Assignment,
        sent: Mapping[str, npt.NDArray[Any]],
        names: Sequence[str],
    ) -> Float32Arrays:
        """Return the gradient that a report's projections are an estimate of."""
        directions = directions_of(assignment)
        expected_bytes = directions.count * PROJECTION_TYPE.itemsize
        data = report.projections or b""
        if len(data) != expected_bytes:
            raise UpdateRefused(
                "wrong-projections", f"{len(data)} bytes instead of {expected_bytes}"
            )
        received = np.frombuffer(data, PROJECTION_TYPE)
        projections = finite("projections", received.astype(np.float32))
        # A projection's standard deviation is the norm of the gradient itself.
        limit = np.float32(self.max_gradient_norm)
        return estimated_gradient(
            sent,
            names,
            directions=directions,
            projections=projections.clip(-limit, limit),
        )

    def _statistics(
        self, tensors: Mapping[str, bytes], sent: Mapping[str, npt.NDArray[Any]]
    ) -> dict[str, npt.NDArray[Any]]:
        """Return a reply's running statistics."""
        statistics = {}
        for name in statistics_names(tensors):
            if name not in sent:
                continue
            values = read_array(name, tensors[name], sent[name].shape, sent[name].dtype)
            if not is_plausible(name, values):
                raise UpdateRefused("implausible", f"{name} is no running statistic")
            statistics[name] = values
        return statistics

    def _named_tensors(
        self, reply: DeviceReply, names: Sequence[str]
    ) -> Mapping[str, bytes]:
        """Return a reply's arrays by name; all of ``names`` are among them."""
        tensors = reply.tensors
        if not isinstance(tensors, Mapping):
            # Without a report: the arrays that were sent, in that order.
            order: Sequence[str] = self.sent_names
            if "update-kind" in reply.report:
                order = names
                if reply.report["update-kind"] in TRAINED_KINDS:
                    order = (*names, *statistics_names(self.sent_names))
            if len(tensors) != len(order):
                raise UpdateRefused(
                    "wrong-count", f"{len(tensors)} arrays instead of {len(order)}"
                )
            tensors = dict(zip(order, tensors, strict=True))
        missing = [name for name in names if name not in tensors]
        if missing:
            raise UpdateRefused(
                "wrong-count", f"{len(missing)} arrays missing, such as {missing[0]}"
            )
        return tensors


def _norm(gradients: Float32Arrays) -> float:
    """Return the norm of received gradients, of which none may be NaN or infinite."""
    total = 0.0
    for name, gradient in gradients.items():
        squares = squared_norm(gradient)
        if not math.isfinite(squares):
            raise not_finite(name)
        total += squares
    return math.sqrt(total)
