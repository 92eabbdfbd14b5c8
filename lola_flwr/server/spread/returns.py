"""Have devices return what they hold."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from torch import Tensor

from lola_flwr.d2ft.wire import MOMENTS
from lola_flwr.server.spread.exchange import (
    LARGEST_MOMENT,
    LARGEST_VALUE,
    CheckedReply,
    CountedExchange,
    PartFailed,
    PartRequest,
)
from lola_flwr.server.spread.held import HeldValues
from lola_flwr.server.spread.model import ask
from lola_flwr.server.spread.places import Place
from lola_flwr.wire.packing import VALUES
from lola_flwr.wire.records import PartTask

# Raises `PartFailed` if a device cannot have computed with what it returns.
Doubt = Callable[[HeldValues, Place, CheckedReply], None]


def fetch(
    held: HeldValues,
    places: Mapping[Place, str],
    exchange: CountedExchange,
    task: PartTask,
    doubt: Doubt = lambda held, place, reply: None,
    *,
    moments: bool,
) -> dict[str, str]:
    """Have devices return the values of places, those of one branch a message.

    What a device does not return is as the server last knew it.

    Parameters
    ----------
    held
        Who holds what; the values are taken in there.
    places
        The places, and their devices.
    exchange
        How devices are asked.
    task
        What all tasks have in common.
    doubt
        Looks at what is returned.
    moments
        Whether the optimizer's moments are wanted, too.

    Returns
    -------
    Why devices failed, by device id.
    """
    failed: dict[str, str] = {}
    queues: dict[str, list[Place]] = {}
    for place, device in places.items():
        queues.setdefault(device, []).append(place)
    while queues:
        asked = {
            device: PartRequest(returning(held, task, queue[0], moments=moments))
            for device, queue in queues.items()
        }
        try:
            replies = ask(exchange, asked)
            for device, reply in replies.items():
                if not reply.lacks:
                    doubt(held, queues[device][0], reply)
                take_in(held, queues[device][0], reply, moments=moments)
        except PartFailed as failure:
            # The others are asked once more: their replies were dropped.
            failed |= failure.reasons
            held.lose(failure.reasons)
            queues = {d: q for d, q in queues.items() if d not in failure.reasons}
            continue
        queues = {device: queue[1:] for device, queue in queues.items() if queue[1:]}
    return failed


def hand_over(
    held: HeldValues,
    places: Mapping[Place, str],
    present: Collection[str],
    exchange: CountedExchange,
    task: PartTask,
    doubt: Doubt,
) -> dict[str, str]:
    """Have devices return what others are to hold from now on.

    Parameters
    ----------
    held, exchange, task, doubt
        As for `fetch`.
    places
        What each device is to hold.
    present
        The devices that are there.

    Returns
    -------
    Why devices failed, by device id.
    """
    held.lose(held.holders - {*present})
    moved = held.moved(places)
    unknown = held.unknown(moved, moments=True)
    failed = fetch(held, unknown, exchange, task, doubt, moments=True)
    held.release(moved)
    return failed


def returning(
    held: HeldValues, task: PartTask, place: Place, *, moments: bool
) -> PartTask:
    """Return the task to return what is held of a place."""
    return replace(task, kind="return", wants_moments=moments, **held.fields(place))


def returned(
    held: HeldValues, place: Place, reply: CheckedReply, *, moments: bool
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Return the values of a place that a device has returned, and their moments.

    Raises
    ------
    PartFailed
        They are not values of this place.
    """
    values = held.known()
    shapes = [
        tuple(
            piece.length if dim == piece.dim else size
            for dim, size in enumerate(values[piece.name].shape)
        )
        for piece in held.slices(place).own
    ]
    found = reply.tensors(VALUES, shapes, largest=LARGEST_VALUE)
    if not moments:
        return found, None
    each = [shape for shape in shapes for _ in held.moment_names]
    return found, reply.tensors(MOMENTS, each, largest=LARGEST_MOMENT)


def take_in(
    held: HeldValues, place: Place, reply: CheckedReply, *, moments: bool
) -> None:
    """Take note of what a device has returned, or that it has it no more.

    Raises
    ------
    PartFailed
        It is nothing to go on with.
    """
    if reply.lacks:
        held.release([place])
        return
    found, beside = returned(held, place, reply, moments=moments)
    try:
        held.take_in(place, found, beside)
    except ValueError as error:
        raise reply.failure(str(error)) from None
