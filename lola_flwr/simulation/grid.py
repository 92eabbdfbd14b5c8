"""A Grid whose devices are in this process."""

from __future__ import annotations

import copy
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from logging import ERROR
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.supercore.run import Run


class ProcessGrid(Grid):
    """Delivers messages to ClientApps in this process, one device after the other.

    A device is given copies of its message and its context, as it is where processes
    lie between, and what it leaves in the context is kept if it answers. An exception
    of a ClientApp is Flower's error reply.

    Parameters
    ----------
    apps
        The devices' ClientApps, by node id.
    node_configs
        Their node configurations, by node id; of those that are not in it, empty.
    run
        The run.
    run_config
        Its configuration.
    device_threads
        PyTorch's threads while a device computes; None: as many as it has anyway.
    """

    def __init__(
        self,
        apps: Mapping[int, ClientApp],
        node_configs: Mapping[int, Mapping[str, Any]],
        run: Run,
        run_config: Mapping[str, Any],
        device_threads: int | None = None,
    ) -> None:
        self.apps = apps
        self.node_configs = node_configs
        self._run = run
        self._run_config = run_config
        self._device_threads = device_threads
        # Of devices that have answered, by node id.
        self._contexts: dict[int, Context] = {}
        # Sent, and not yet delivered, by message id.
        self._waiting: dict[str, Message] = {}

    def set_run(self, run: Run) -> None:
        """Set the run."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the devices."""
        return list(self.apps)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; a device computes when its reply is asked for."""
        sent = {_named(message): message for message in messages}
        self._waiting |= sent
        return list(sent)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Have the devices compute, and return their replies."""
        waiting = (self._waiting.pop(message_id, None) for message_id in message_ids)
        return [self._deliver(message) for message in waiting if message is not None]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages; return the replies that come in time, in the order sent.

        A device that computes is not interrupted; those whose turn would come after
        the timeout are not asked.
        """
        begun_s = time.monotonic()
        replies = []
        for message in messages:
            if _is_over(begun_s, timeout):
                break
            reply = self._deliver(message)
            if not _is_over(begun_s, timeout):
                replies.append(reply)
        return replies

    def _deliver(self, message: Message) -> Message:
        """Return a device's reply to a message."""
        _named(message)
        node = message.metadata.dst_node_id
        # The bytes of arrays are shared, since nobody can change them.
        given, context = copy.deepcopy((message, self._context(node)))
        try:
            with _threads(self._device_threads):
                reply = self.apps[node](given, context)
        # It is the app's code; Flower's engine answers for it in the same words.
        except Exception as error:
            log(ERROR, "device %s: its ClientApp raised", node, exc_info=error)
            reply = Message(
                Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, _reason(error)),
                reply_to=message,
            )
        else:
            self._contexts[node] = context
        _named(reply)
        return copy.deepcopy(reply)

    def _context(self, node: int) -> Context:
        """Return what a device left, or the context of one that begins."""
        return self._contexts.get(node) or Context(
            run_id=self._run.run_id,
            node_id=node,
            node_config=dict(self.node_configs.get(node, {})),
            state=RecordDict(),
            run_config=dict(self._run_config),
        )


def _named(message: Message) -> str:
    """Give a message the id that a SuperLink would, and return it."""
    metadata = message.metadata.__dict__
    metadata["_message_id"] = metadata["_message_id"] or str(uuid.uuid4())
    return str(metadata["_message_id"])


def _is_over(begun_s: float, timeout_s: float | None) -> bool:
    return timeout_s is not None and time.monotonic() - begun_s >= timeout_s


def _reason(error: Exception) -> str:
    return f"{type(error)}:<'{error}'>"


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """Let PyTorch compute with so many threads, if it is loaded at all."""
    torch = sys.modules.get("torch")
    if number is None or torch is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
