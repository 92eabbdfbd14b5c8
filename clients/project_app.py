"""A project's ClientApp under the strategy: its train function stays as it is."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from flwr.app import Array, ArrayRecord, Context, Message, MessageType
from flwr.client import ClientFnExt
from flwr.clientapp import ClientApp as FlowerClientApp
from flwr.clientapp.typing import ClientAppCallable, Mod
from flwr.common import Code, Config, GetPropertiesRes, Status
from flwr.common.constant import MessageTypeLegacy
from flwr.compat.common.recorddict_compat import getpropertiesres_to_recorddict

from lola_flwr.clients.assigned_block import as_asked, cut_to_block, sent_arrays
from lola_flwr.clients.held_copies import LEGACY_METRICS, complete_arrays, held_mod
from lola_flwr.clients.node import known_properties
from lola_flwr.clients.profiles import profile_reply
from lola_flwr.device.own_training import asked_names, noted_blocks, weights_report
from lola_flwr.device.store import run_store
from lola_flwr.errors import UserError
from lola_flwr.wire.records import (
    MANIFEST_KEY,
    OURS,
    PLACES_KEY,
    PROFILE_ACTION,
    REPORT_KEY,
    SECAGG_KEY,
    SECAGG_REFUSAL,
    Assignment,
    UpdateReport,
    unmarked,
)
from lola_flwr.wire.versions import Manifest


class ClientApp(FlowerClientApp):
    """Flower's ClientApp for a project that trains blocks.

    It answers the strategy's question for the device's profile, completes what the
    server has left out since the device holds it, and cuts replies of training down to
    the assigned block. With ``AssignedBlock(model, message)`` before the training no
    more than that is trained. Under another strategy it is Flower's ClientApp.

    Parameters
    ----------
    client_fn, mods
        As of ``flwr.clientapp.ClientApp``; the mods see whole models.
    """

    def __init__(
        self, client_fn: ClientFnExt | None = None, mods: list[Mod] | None = None
    ) -> None:
        super().__init__(client_fn, [project_mod, *(mods or [])])

    def __call__(self, message: Message, context: Context) -> Message:
        """Execute the app; the strategy's question is answered apart from its mods."""
        if message.metadata.message_type == f"{MessageType.QUERY}.{PROFILE_ACTION}":
            return profile_reply(message, known_properties(context))
        return super().__call__(message, context)


def project_mod(
    message: Message, context: Context, call_next: ClientAppCallable
) -> Message:
    """Do what `ClientApp` does, as a mod.

    An app of registered functions needs ``report_profile`` beside it: there Flower
    shows mods no question that no function answers.

    Parameters
    ----------
    message, context, call_next
        As Flower hands them to a mod.

    Raises
    ------
    UserError
        The server aggregates securely or expects gradients, or block and head could not
        be trained or are not in the reply.
    """
    records = message.content.config_records
    if SECAGG_KEY in records:
        raise UserError(SECAGG_REFUSAL)
    if message.metadata.message_type == MessageTypeLegacy.GET_PROPERTIES:
        properties: Config = {**known_properties(context)}
        result = GetPropertiesRes(Status(Code.OK, ""), properties)
        return Message(getpropertiesres_to_recorddict(result), reply_to=message)
    for record in records.values():
        if MANIFEST_KEY in record:
            manifest = Manifest.from_text(str(record.pop(MANIFEST_KEY)))
            complete_arrays(message.content, manifest, run_store(context.run_id))
    is_assignment = any("block-index" in unmarked(r) for r in records.values())
    kind, _, _ = message.metadata.message_type.partition(".")
    if kind != MessageType.TRAIN or not is_assignment:
        return call_next(message, context)
    train = partial(_train, call_next=call_next)
    try:
        directory = run_store(context.run_id)
    except UserError:
        # A device that can keep nothing says so, and is sent everything.
        return train(message, context)
    train = partial(train, completes=True)
    return held_mod(message, context, train, directory=directory)


def _train(
    message: Message,
    context: Context,
    *,
    call_next: ClientAppCallable,
    completes: bool | None = None,
) -> Message:
    """Train, and cut the reply down to the block."""
    start = time.perf_counter()
    (record,) = message.content.config_records.values()
    assignment = Assignment.from_record(record)
    places = record.get(PLACES_KEY)
    kept = [*map(int, places.split())] if isinstance(places, str) else []
    sent = _sent(message, assignment, kept)
    with noted_blocks() as blocks:
        try:
            reply = call_next(message, context)
        finally:
            for block in blocks:
                block.__exit__(None, None, None)
    if reply.has_error() or _has_report(reply):
        return reply
    for block in blocks:
        block.check()
    legacy = reply.content.config_records.get(LEGACY_METRICS)
    said = [legacy] if legacy is not None else reply.content.metric_records.values()
    loss = _loss_in(pair for metrics in said for pair in metrics.items())
    report = replace(weights_report(assignment, start, loss), completes=completes)
    if legacy is None:
        cut_to_block(reply.content, assignment, report, sent)
    elif isinstance(places, str):
        _cut_list(reply, assignment, kept, sent, report)
    return reply


def _has_report(reply: Message) -> bool:
    """Tell whether the project's own code has cut the reply, and said so."""
    records = reply.content.config_records
    legacy = records.get(LEGACY_METRICS)
    return REPORT_KEY in records or (
        legacy is not None and "update-kind" in unmarked(legacy)
    )


def _sent(
    message: Message, assignment: Assignment, places: Sequence[int]
) -> dict[str, Array]:
    """Return block and head as they were received: by name, or of a list by place."""
    if assignment.codec == "fp32":
        return {}
    names, _ = asked_names(assignment)
    if not places:
        return sent_arrays(message.content, names)
    (record,) = message.content.array_records.values()
    # Running statistics are behind them.
    return {str(place): record[str(place)] for place in places[: len(names)]}


def _cut_list(
    reply: Message,
    assignment: Assignment,
    places: Sequence[int],
    sent: Mapping[str, Array],
    report: UpdateReport,
) -> None:
    """Leave of a NumPyClient's list the arrays at some places."""
    ((key, record),) = reply.content.array_records.items()
    arrays = [*record.values()]
    if arrays and max(places) >= len(arrays):
        raise UserError(
            f"fit returned {len(arrays)} arrays, but the server asks for number "
            f"{max(places)}: return as many as were received, in that order."
        )
    kept = {str(place): arrays[place] for place in places} if arrays else {}
    asked = as_asked(assignment, sent, kept).values()
    reply.content[key] = ArrayRecord({str(n): array for n, array in enumerate(asked)})
    told = {OURS + key: value for key, value in report.to_record().items()}
    reply.content.config_records[LEGACY_METRICS].update(told)


def _loss_in(metrics: Iterable[tuple[str, object]]) -> float | None:
    """Return the training loss among a project's metrics, if just one is called so."""
    losses = [
        float(value)
        for name, value in metrics
        if name.lower().endswith("loss") and isinstance(value, (int, float))
    ]
    return losses[0] if len(losses) == 1 else None
