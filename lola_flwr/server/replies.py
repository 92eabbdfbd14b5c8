"""Read the update out of a device's reply, which is never trusted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from lola_flwr.arrays import Float32Array, Float32Arrays, squared_norm
from lola_flwr.errors import brief, quoted
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
from lola_flwr.wire.codec import codec_named
from lola_flwr.wire.low_rank import projection_of
from lola_flwr.wire.packing import GRADIENTS, packed_type, unpack
from lola_flwr.wire.records import (
    FAILURE_DETAIL_KEY,
    FAILURE_KEY,
    OUT_OF_MEMORY,
    PROJECTION_TYPE,
    Assignment,
    MalformedRecord,
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


# Kinds of updates of devices that train the weights themselves.
_TRAINED = ("weights", "moves")

# Beyond these a device's report is not believed: no mini-batch takes a day, and no loss
# that can still be trained on is this large.
_LONGEST_COMPUTE_S = 86_400.0
_LARGEST_LOSS = 1e6
_LARGEST_PEAK_BYTES = 1e15
_LARGEST_SQUARE = 1e18
_LARGEST_COMPUTE_J = 1e9


def _failure(record: Mapping[str, object]) -> UpdateRefused:
    """Return what a device says that kept it from training."""
    kind = record[FAILURE_KEY]
    reason = kind if kind == OUT_OF_MEMORY else "device-failure"
    return UpdateRefused(str(reason), quoted(record.get(FAILURE_DETAIL_KEY, kind)))


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

        Raises
        ------
        UpdateRefused
            The reply cannot be used.
        """
        if assignment is None:
            raise UpdateRefused("not-asked", "the device has no block this round")
        report = self._read_report(assignment, reply.report)
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
        if report.update_kind in _TRAINED:
            examples = min(examples, most)
        elif examples > most:
            raise UpdateRefused("wrong-examples", f"claims {examples} of {most}")
        blocks = assignment.blocks
        names = self.partition.update_names(*blocks, head=assignment.sends_head)
        if report.update_kind == "zeroth-order":
            estimate = self._estimated(report, assignment, sent, names)
            return BlockUpdate(estimate, examples, zeroth_order=True), report
        if report.update_kind == "gradient":
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
        codec = codec_named(assignment.codec)
        projection = projection_of(assignment)
        shapes = {name: sent[name].shape for name in names}
        if projection is not None:
            shapes = {name: projection.shape(shape) for name, shape in shapes.items()}
        data = self._named_tensors(reply, (GRADIENTS,))[GRADIENTS]
        packed = read_array(GRADIENTS, data, *packed_type(codec, shapes.values()))
        gradients: dict[str, Float32Array] = {}
        for name, wire in unpack(packed, codec, shapes).items():
            received = decoded(name, wire, shapes[name], codec)
            if projection is not None:
                received = projection.lift(
                    assignment.server_round, name, received, sent[name].shape
                )
            gradients[name] = received
        return gradients

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

    def _read_report(
        self, assignment: Assignment, record: Mapping[str, object]
    ) -> UpdateReport:
        """Return a checked report: for a device that gives none, what goes unsaid."""
        if FAILURE_KEY in record:
            raise _failure(record)
        if "update-kind" not in record:
            return UpdateReport(
                server_round=assignment.server_round,
                block_index=assignment.block_index,
                update_kind="weights",
                loss=None,
                compute_s=None,
                compute_clock="",
            )
        try:
            report = UpdateReport.from_record(record)
        except MalformedRecord as error:
            raise UpdateRefused("malformed-report", str(error)) from None
        if report.server_round != assignment.server_round:
            raise UpdateRefused("late", f"answers round {report.server_round}")
        if report.block_index != assignment.block_index:
            raise UpdateRefused("wrong-block", f"is for block {report.block_index}")
        estimates = assignment.direction_seed is not None
        trained = _TRAINED if self.takes_weights else ()
        kinds = ["zeroth-order"] if estimates else ["gradient", *trained]
        if report.update_kind not in (*kinds, "nothing"):
            raise UpdateRefused("wrong-kind", f"holds {quoted(report.update_kind)}")
        if report.update_kind == "zeroth-order" and (
            report.direction_seed != assignment.direction_seed
        ):
            raise UpdateRefused(
                "wrong-seed", f"is about the directions of seed {report.direction_seed}"
            )
        if report.compute_clock not in ("", "measured", "simulated"):
            clock = quoted(report.compute_clock)
            raise UpdateRefused("malformed-report", f"compute-clock={clock}")
        if report.uplink_limit not in (None, "pacing", "tc"):
            limit = quoted(report.uplink_limit)
            raise UpdateRefused("malformed-report", f"uplink-limit={limit}")
        compute_s, loss = report.compute_s, report.loss
        if compute_s is not None and not 0 <= compute_s <= _LONGEST_COMPUTE_S:
            raise UpdateRefused("implausible", f"compute_s={compute_s:g}")
        if loss is not None and not abs(loss) <= _LARGEST_LOSS:
            raise UpdateRefused("implausible", f"loss={loss:g}")
        peak_bytes = report.peak_memory_bytes
        if peak_bytes is not None and not 0 <= peak_bytes <= _LARGEST_PEAK_BYTES:
            raise UpdateRefused("implausible", f"peak_memory_bytes={peak_bytes:g}")
        joules = report.compute_j
        if joules is not None and not 0 <= joules <= _LARGEST_COMPUTE_J:
            raise UpdateRefused("implausible", f"compute_j={joules:g}")
        return _with_checked_squares(report, assignment)

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
                if reply.report["update-kind"] in _TRAINED:
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


def _with_checked_squares(report: UpdateReport, assignment: Assignment) -> UpdateReport:
    """Return a report without the squares that nobody asked for; check the others."""
    few, most = report.few_examples, report.all_examples
    squares = report.few_square, report.all_square
    if not assignment.measures_noise or None in (few, most, *squares):
        return replace(
            report,
            few_examples=None,
            few_square=None,
            all_examples=None,
            all_square=None,
        )
    if not (few and most and 1 <= few < most <= assignment.batch_size):
        raise UpdateRefused("implausible", f"squares over {few} of {most} examples")
    for square in squares:
        if not (square is not None and 0 <= square <= _LARGEST_SQUARE):
            raise UpdateRefused("implausible", f"a squared norm of {square:g}")
    return report


def _norm(gradients: Float32Arrays) -> float:
    """Return the norm of received gradients, of which none may be NaN or infinite."""
    total = 0.0
    for name, gradient in gradients.items():
        squares = squared_norm(gradient)
        if not math.isfinite(squares):
            raise not_finite(name)
        total += squares
    return math.sqrt(total)
