"""A project's ClientApp under the strategy: its train function stays as it is."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from functools import partial

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType
from flwr.client import ClientFnExt
from flwr.clientapp import ClientApp as FlowerClientApp
from flwr.clientapp.typing import ClientAppCallable, Mod
from flwr.common import Code, Config, GetPropertiesRes, Status
from flwr.common.constant import MessageTypeLegacy
from flwr.compat.common.recorddict_compat import getpropertiesres_to_recorddict

from lola_flwr.clients.assigned_block import cut_to_block
from lola_flwr.clients.held_copies import LEGACY_METRICS, held_mod
from lola_flwr.clients.node import known_properties
from lola_flwr.clients.profiles import profile_query
from lola_flwr.device.own_training import noted_blocks, weights_report
from lola_flwr.errors import UserError
from lola_flwr.wire.records import (
    OURS,
    PLACES_KEY,
    REPORT_KEY,
    SECAGG_KEY,
    SECAGG_REFUSAL,
    Assignment,
    UpdateReport,
    unmarked,
)


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
        if client_fn is None:
            profile_query(self, known_properties)


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
    is_training = message.metadata.message_type.partition(".")[0] == MessageType.TRAIN
    if not is_training or not any(
        "block-index" in record for record in records.values()
    ):
        return call_next(message, context)
    return held_mod(message, context, partial(_train, call_next=call_next))


def _train(
    message: Message, context: Context, *, call_next: ClientAppCallable
) -> Message:
    """Train, and cut the reply down to the block."""
    start = time.perf_counter()
    (record,) = message.content.config_records.values()
    assignment = Assignment.from_record(record)
    places = record.get(PLACES_KEY)
    with noted_blocks() as blocks:
        try:
            reply = call_next(message, context)
        finally:
            for block in blocks:
                block.__exit__(None, None, None)
    legacy = None if reply.has_error() else _legacy_metrics(reply)
    if reply.has_error() or REPORT_KEY in reply.content.config_records:
        return reply
    if legacy is not None and "update-kind" in unmarked(legacy):
        return reply
    for block in blocks:
        block.check()
    if legacy is None:
        losses = [m.items() for m in reply.content.metric_records.values()]
        loss = _loss_in([pair for items in losses for pair in items])
        cut_to_block(reply.content, assignment, weights_report(assignment, start, loss))
    elif isinstance(places, str):
        report = weights_report(assignment, start, _loss_in([*legacy.items()]))
        _cut_list(reply, [*map(int, places.split())], report)
    return reply


def _legacy_metrics(reply: Message) -> ConfigRecord | None:
    """Return the metrics of a NumPyClient's reply; None of any other's."""
    return reply.content.config_records.get(LEGACY_METRICS)


def _cut_list(reply: Message, places: Sequence[int], report: UpdateReport) -> None:
    """Leave of a NumPyClient's list the arrays at some places."""
    ((key, record),) = reply.content.array_records.items()
    arrays = [*record.values()]
    if arrays and max(places) >= len(arrays):
        raise UserError(
            f"fit returned {len(arrays)} arrays, but the server asks for number "
            f"{max(places)}: return as many as were received, in that order."
        )
    kept = [arrays[place] for place in places] if arrays else []
    reply.content[key] = ArrayRecord({str(n): array for n, array in enumerate(kept)})
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
