"""Train an assigned block inside an existing project's own training code."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MessageType,
    RecordDict,
)
from flwr.clientapp.typing import ClientAppCallable
from flwr.common import Config, NDArrays, Scalar

from lola_flwr.clients.received import assignment_in, values_of
from lola_flwr.device.own_training import (
    Model,
    PreparedBlock,
    asked_names,
    encoded_moves,
    weights_report,
)
from lola_flwr.errors import UserError
from lola_flwr.model.statistics import statistics_names
from lola_flwr.wire.records import REPORT_KEY, Assignment, UpdateReport


class AssignedBlock(PreparedBlock):
    """Prepares a model for its assigned block, and collects the reply.

    From here on only the block and the head want gradients, so that back-propagation
    ends in the block, and optimizers leave all other parameters alone. Make it after
    the received arrays are loaded, and before training::

        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        block = AssignedBlock(model, message)
        ...  # train the model, and put the content of the reply together, as ever
        return Message(block.finish(content), reply_to=message)

    As a context manager it restores every ``requires_grad`` flag at the end. Running
    statistics, as those of BatchNorm, go back with the block: of all layers, since all
    have seen the data.

    Parameters
    ----------
    model
        The model to train.
    received
        The server's message, or under ``NumPyClient`` the ``config`` of ``fit``.

    Raises
    ------
    MalformedRecord
        The server's strategy is not LoLa-DEFT: there is no assignment.
    UserError
        The model is not the server's or has frozen what the server asks for, or the
        server aggregates securely or expects gradients.
    """

    def __init__(self, model: Model, received: Message | Config) -> None:
        if not isinstance(received, Message):
            super().__init__(model, Assignment.from_record(received))
            return
        assignment = assignment_in(received.content)
        sent = {}
        if assignment.codec != "fp32":
            # Moves are from these, whenever the model takes them in.
            sent = sent_arrays(received.content, asked_names(assignment)[0])
        arrays = {name: values_of(array) for name, array in sent.items()}
        super().__init__(model, assignment, arrays)

    def finish(self, content: RecordDict, loss: float | None = None) -> RecordDict:
        """Let the content of a reply hold the block in place of the whole model.

        Parameters
        ----------
        content
            Content of the reply, with one ArrayRecord; changed in place.
        loss
            Mean training loss, for the server's log.

        Returns
        -------
        ``content``
        """
        arrays = {name: Array(values) for name, values in self.update().items()}
        return _filled(content, arrays, self.report(loss))

    def fit_result(
        self,
        num_examples: int,
        metrics: dict[str, Scalar] | None = None,
        loss: float | None = None,
    ) -> tuple[NDArrays, int, dict[str, Scalar]]:
        """Return what ``NumPyClient.fit`` returns.

        Parameters
        ----------
        num_examples
            Examples that the model was trained on.
        metrics
            Further metrics.
        loss
            Mean training loss, for the server's log.
        """
        report = self.report(loss).to_record()
        return [*self.update().values()], num_examples, {**(metrics or {}), **report}


def block_mod(
    message: Message,
    context: Context,
    call_next: ClientAppCallable,
    *,
    loss_key: str | None = None,
) -> Message:
    """Cut the reply of an untouched train function down to the assigned block.

    A mod for ``@app.train(mods=[block_mod])``; it comes before mods that want the whole
    model back, as ``fixedclipping_mod`` does. The function trains the whole model, so
    the device saves upload, and neither memory nor computation: ``AssignedBlock``
    saves all three.

    Parameters
    ----------
    message, context, call_next
        As Flower hands them to a mod.
    loss_key
        Metric of the reply that is the mean training loss; give it with
        ``functools.partial``.

    Raises
    ------
    UserError
        The server aggregates securely or expects gradients, or the reply has not one
        ArrayRecord.
    """
    if message.metadata.message_type.partition(".")[0] != MessageType.TRAIN:
        return call_next(message, context)
    start = time.perf_counter()
    assignment = assignment_in(message.content)
    names, _ = asked_names(assignment)
    sent = sent_arrays(message.content, names)
    reply = call_next(message, context)
    if reply.has_error():
        return reply
    losses = [
        float(loss)
        for metrics in reply.content.metric_records.values()
        for name, loss in metrics.items()
        if name == loss_key and not isinstance(loss, list)
    ]
    report = weights_report(assignment, start, losses[0] if losses else None)
    cut_to_block(reply.content, assignment, report, sent)
    return reply


def sent_arrays(content: RecordDict, names: Iterable[str]) -> dict[str, Array]:
    """Return those of a message's arrays that have some names."""
    arrays = _only_arrays(content)
    return {name: arrays[name] for name in names if name in arrays}


def cut_to_block(
    content: RecordDict,
    assignment: Assignment,
    report: UpdateReport,
    sent: Mapping[str, Array],
) -> RecordDict:
    """Let the content of a reply hold the assigned block in place of the whole model.

    Parameters
    ----------
    content
        Content of the reply, with one ArrayRecord; changed in place.
    assignment
        What the server asked for.
    report
        What goes with the block.
    sent
        The block's and the head's arrays as they were received.

    Raises
    ------
    UserError
        The server expects gradients, or there is not one ArrayRecord.
    """
    names, _ = asked_names(assignment)
    arrays = _only_arrays(content)
    wanted = (*names, *statistics_names(arrays))
    kept = {n: arrays[n] for n in wanted if n in arrays}
    return _filled(content, as_asked(assignment, sent, kept), report)


def as_asked(
    assignment: Assignment, sent: Mapping[str, Array], trained: Mapping[str, Array]
) -> dict[str, Array]:
    """Return the arrays of a reply in the codec that the server asks for.

    Raises
    ------
    UserError
        One of them has another shape than was received.
    """
    if assignment.codec == "fp32":
        return {**trained}
    # Arrays of the legacy interface say nothing of their shapes.
    before = {name: values_of(array) for name, array in sent.items()}
    after = {name: values_of(array) for name, array in trained.items()}
    for name in before.keys() & after.keys():
        if before[name].shape != after[name].shape:
            raise UserError(
                f"{name} was received with shape {before[name].shape} and is returned "
                f"with {after[name].shape}: return what was received."
            )
    moves = encoded_moves(assignment, before, after)
    return {name: Array(values) for name, values in moves.items()}


def _only_arrays(content: RecordDict) -> ArrayRecord:
    records = list(content.array_records.values())
    if len(records) != 1:
        raise UserError(
            f"The message has {len(records)} ArrayRecords; LoLa-DEFT needs one, with "
            "the model's arrays under the names of its state dict."
        )
    return records[0]


def _filled(
    content: RecordDict, arrays: dict[str, Array], report: UpdateReport
) -> RecordDict:
    _only_arrays(content)
    (key,) = content.array_records
    content[key] = ArrayRecord(arrays)
    content[REPORT_KEY] = ConfigRecord({**report.to_record()})
    return content
