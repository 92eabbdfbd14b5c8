"""What the server asks of devices within a step, and their replies, never trusted."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from lola_flwr.d2ft.wire import numbers_from_text, sizes_from_text, tensors_of
from lola_flwr.errors import quoted
from lola_flwr.wire.npy import MalformedArray, read_npy
from lola_flwr.wire.records import MalformedRecord, PartReport, PartTask

# Hidden states, losses, and gradients of a loss with respect to hidden states or to the
# head: of a model that can still be trained none is larger. (What is not finite is not
# below a limit either.)
LARGEST_HIDDEN = 1e4
LARGEST_LOSS = 1e6
LARGEST_LOSS_SLOPE = 1e4
LARGEST_HEAD_GRADIENT = 1e6
# In terms of the largest gradient that a branch is sent: what it may return of its
# inputs, and of its parameters, which are sums over tokens of products with hidden
# states. So whoever goes on with a lie is not taken for the liar.
LARGEST_SLOPE_GAIN = 1e4
LARGEST_PARAMETER_GAIN = 1e9
# Weights, and what optimizers keep beside them.
LARGEST_VALUE = 1e3
LARGEST_MOMENT = 1e30


class PartFailed(Exception):
    """Devices did not do their parts of a step.

    Parameters
    ----------
    reasons
        What went wrong, by device id; empty: it is not known whose fault it is.
    text
        What to say (default: the reasons).
    """

    def __init__(self, reasons: Mapping[str, str], text: str = "") -> None:
        named = "; ".join(f"device {d}: {reason}" for d, reason in reasons.items())
        super().__init__(text or named)
        self.reasons = dict(reasons)


class LieFound(PartFailed):
    """What devices sent is not what comes of what they were asked: no accident."""


@dataclass(frozen=True, eq=False)
class PartRequest:
    """What one device is asked in an exchange.

    Parameters
    ----------
    task
        What it is asked for.
    arrays
        What it is sent for that.
    fuller
        Gives the same with what the device lacks, or None if there is no more to give.
    """

    task: PartTask
    arrays: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    fuller: Callable[[str], PartRequest | None] = lambda _: None


@dataclass(frozen=True, eq=False)
class PartReply:
    """What it sends back, unchecked: arrays in .npy format, and a flat record."""

    arrays: Mapping[str, bytes]
    report: Mapping[str, object]


# Sends requests, by device id, and returns the replies; `PartFailed` if one is missing.
Exchange = Callable[[Mapping[str, PartRequest]], Mapping[str, PartReply]]


class CheckedReply:
    """Reads a device's reply to a task.

    Parameters
    ----------
    device_id
        The device.
    task
        What it was asked.
    reply
        What it sent.

    Raises
    ------
    PartFailed
        The reply is to something else; each method, too, if it lacks what is read.
    """

    def __init__(self, device_id: str, task: PartTask, reply: PartReply) -> None:
        self._device_id = device_id
        self._arrays = reply.arrays
        try:
            self._report = PartReport.from_record(reply.report)
        except MalformedRecord as error:
            raise self.failure(str(error)) from None
        for name in ("kind", "step", "layer_index", "branch_index"):
            said, asked = getattr(self._report, name), getattr(task, name)
            if said != asked:
                raise self.failure(f"{name}={quoted(said)} instead of {asked!r}")

    @property
    def digest(self) -> str:
        """What the device knows its micro-batches by."""
        return self._report.digest[:64]

    @property
    def lacks(self) -> str:
        """What the device would need besides; empty if it did what it was asked."""
        return self._report.lacks[:64]

    def squares(self, count: int, largest: float) -> npt.NDArray[np.float64]:
        """Return sums of squares, of so many groups, none larger than given."""
        return self._sums("squares", self._report.squares, count, largest)

    def magnitudes(self, count: int, largest: float) -> npt.NDArray[np.float64]:
        """Return sums of magnitudes, likewise."""
        return self._sums("magnitudes", self._report.magnitudes, count, largest)

    def _sums(
        self, name: str, data: bytes, count: int, largest: float
    ) -> npt.NDArray[np.float64]:
        sums = (
            np.frombuffer(data[: 8 * count], "<f8") if len(data) == 8 * count else None
        )
        if sums is None or not ((sums >= 0) & (sums <= largest)).all():
            raise self.failure(
                f"{name}={quoted(data.hex())} are not {count} sums of at most "
                f"{largest:g}"
            )
        return sums

    def sizes(
        self, count: int, batch_size: int, max_tokens: int
    ) -> list[tuple[int, int]]:
        """Return examples and tokens of so many micro-batches."""
        try:
            sizes = sizes_from_text(self._report.sizes)
        except MalformedRecord as error:
            raise self.failure(str(error)) from None
        if (
            len(sizes) != count
            or max(size[0] for size in sizes) > batch_size
            or max(size[1] for size in sizes) > max_tokens
        ):
            raise self.failure(
                f"sizes={quoted(self._report.sizes)} instead of {count} micro-batches "
                f"of at most {batch_size} examples of {max_tokens} tokens"
            )
        return sizes

    def weights(self, most: Sequence[int]) -> list[int]:
        """Return what the losses are means over, each at most as much as given."""
        try:
            weights = numbers_from_text(self._report.weights)
        except MalformedRecord as error:
            raise self.failure(str(error)) from None
        if len(weights) != len(most) or any(map(operator.gt, weights, most)):
            raise self.failure(
                f"weights={quoted(self._report.weights)} are more than {most}"
            )
        return weights

    def losses(self, count: int) -> list[float]:
        """Return the losses of so many micro-batches."""
        data = self._report.losses
        if len(data) != 4 * count:
            raise self.failure(f"{len(data)} bytes are not {count} losses")
        losses = np.frombuffer(data, "<f4")
        if not (abs(losses) <= LARGEST_LOSS).all():
            raise self.failure(f"losses={losses.tolist()} are implausible")
        return [float(loss) for loss in losses]

    def tensors(
        self,
        name: str,
        shapes: Sequence[Sequence[int]],
        *,
        largest: float,
        dtype: np.dtype[Any] | None = None,
    ) -> list[Tensor]:
        """Return the tensors that one array holds.

        Parameters
        ----------
        name
            Name of the array.
        shapes
            Shapes of the tensors.
        largest
            Largest magnitude that they may have.
        dtype
            Their type (default: float32).
        """
        if name not in self._arrays:
            raise self.failure(f"the array {name!r} is missing")
        total = sum(int(np.prod(shape)) for shape in shapes)
        wanted = np.dtype("f4") if dtype is None else dtype
        try:
            array = read_npy(self._arrays[name], shape=(total,), dtype=wanted)
        except MalformedArray as error:
            raise self.failure(f"{name}: {error}") from None
        if not (abs(array) <= largest).all():
            raise self.failure(f"{name} holds NaN, infinity, or more than {largest:g}")
        return tensors_of(array, shapes)

    def failure(self, reason: str) -> PartFailed:
        """Return the error that names the device."""
        return PartFailed({self._device_id: reason})


class CountedExchange:
    """An exchange whose messages are counted.

    Parameters
    ----------
    exchange
        The exchange.
    before
        What is counted with it.
    """

    def __init__(
        self, exchange: Exchange, before: CountedExchange | None = None
    ) -> None:
        self._exchange = exchange
        self.asked: set[str] = set()
        self.exchanges: int = 0
        self.sent_bytes: int = 0
        self.received_bytes: Counter[str] = Counter()  # by device id
        if before is not None:
            self.exchanges, self.sent_bytes = before.exchanges, before.sent_bytes
            self.received_bytes += before.received_bytes

    def anew(self) -> CountedExchange:
        """Return the same exchange, of which nothing is counted yet."""
        return CountedExchange(self._exchange)

    def __call__(self, requests: Mapping[str, PartRequest]) -> Mapping[str, PartReply]:
        """Send requests, by device id, and return the replies."""
        self.exchanges += 1
        self.asked |= requests.keys()
        self.sent_bytes += sum(
            array.nbytes for r in requests.values() for array in r.arrays.values()
        )
        replies = self._exchange(requests)
        for device, reply in replies.items():
            self.received_bytes[device] += sum(map(len, reply.arrays.values()))
        return replies
