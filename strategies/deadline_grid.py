"""A Grid that waits no longer than it is told, and lets nothing unreadable through."""

from __future__ import annotations

from collections.abc import Iterable
from logging import WARNING

from flwr.app import Message
from flwr.app.message_type import MessageType
from flwr.common.logger import log
from flwr.compat.common import recorddict_compat as compat
from flwr.serverapp import Grid

from lola_flwr.errors import UserError
from lola_flwr.protocol import SECAGG_KEY, SECAGG_REFUSAL
from lola_flwr.strategies.arrival_grid import ArrivalGrid


class DeadlineGrid(ArrivalGrid):  # type: ignore[misc]
    """Wraps the Grid that the legacy workflow sends its rounds through.

    Flower's ``DefaultWorkflow`` waits for all replies, however long they take, and ends
    the run when one of them lacks a record that it expects. Through this Grid a reply
    that is late, or that is no FitRes or EvaluateRes, is simply not there.

    Parameters
    ----------
    grid
        The Grid to send through.
    timeout_s
        How long to wait for the replies to one batch of messages.
    """

    def __init__(self, grid: Grid, *, timeout_s: float) -> None:
        super().__init__(grid)
        self._timeout_s = timeout_s

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages; return the readable replies that come in time.

        Raises
        ------
        UserError
            The messages belong to a secure aggregation.
        """
        messages = list(messages)
        if any(SECAGG_KEY in message.content.config_records for message in messages):
            raise UserError(SECAGG_REFUSAL)
        replies = super().send_and_receive(
            messages, timeout=self._timeout_s if timeout is None else timeout
        )
        return [reply for reply in replies if _is_readable(reply)]


def _is_readable(reply: Message) -> bool:
    if reply.has_error():
        return True
    try:
        if reply.metadata.message_type == MessageType.TRAIN:
            compat.recorddict_to_fitres(reply.content, keep_input=True)
        elif reply.metadata.message_type == MessageType.EVALUATE:
            compat.recorddict_to_evaluateres(reply.content)
    # Flower's conversion fails on foreign records in many ways, all of which mean that
    # this device sent something else than it was asked for.
    except Exception as error:
        node = reply.metadata.src_node_id
        log(WARNING, "unreadable reply of node %s: %s", node, repr(error)[:200])
        return False
    return True
