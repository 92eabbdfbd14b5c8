"""Grids that wait no longer than a round may take."""

from __future__ import annotations

from collections.abc import Iterable
from logging import WARNING

from flwr.app import Message
from flwr.app.message_type import MessageType
from flwr.common.logger import log
from flwr.compat.common import recorddict_compat as compat
from flwr.serverapp import Grid
from flwr.supercore.run import RunNotRunningException

from lola_flwr.errors import UserError
from lola_flwr.strategies.arrival_grid import ArrivalGrid, WaitS
from lola_flwr.wire.records import SECAGG_KEY, SECAGG_REFUSAL


class DeadlineGrid(ArrivalGrid):
    """Wraps the Grid that a strategy sends its rounds through.

    Parameters
    ----------
    grid
        The Grid to send through.
    wait_s
        Gives how long to wait for the replies to the messages that are sent now.
    """

    def __init__(self, grid: Grid, *, wait_s: WaitS) -> None:
        super().__init__(grid)
        self._wait_s = wait_s

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages; return the replies that come in time."""
        replies: Iterable[Message] = self.receive(messages, self._wait_s, timeout)
        return replies


class LegacyGrid(DeadlineGrid):
    """Also lets nothing through that Flower's legacy workflow cannot read.

    ``DefaultWorkflow`` ends the run when a reply lacks a record that it expects.
    Through this Grid a reply that is no FitRes or EvaluateRes is simply not there.
    """

    def __init__(self, grid: Grid, *, wait_s: WaitS) -> None:
        super().__init__(grid, wait_s=wait_s)
        self._has_ended = False

    def end(self) -> None:
        """Let Flower's thread that asks for nodes end, which an exception leaves."""
        self._has_ended = True

    def get_node_ids(self) -> Iterable[int]:
        """Return the connected nodes.

        Raises
        ------
        RunNotRunningException
            The run has ended.
        """
        if self._has_ended:
            raise RunNotRunningException
        return super().get_node_ids()

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
        replies = super().send_and_receive(messages, timeout=timeout)
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
