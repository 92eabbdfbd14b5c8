"""A Grid whose devices are in this process, and in others beside it."""

from __future__ import annotations

import copy
import math
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Lock
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from lola_flwr.simulation.answering import answer
from lola_flwr.simulation.device_processes import DeviceProcess

# Gives a device's reply, and its context after it if its app did not raise.
_Answer = Callable[[Message, Context], tuple[Message, Context | None]]


class ProcessGrid(Grid):
    """Delivers messages to ClientApps in this process, one device after the other.

    Where there are further processes, each takes the next device that is left, too, and
    several compute at a time; one device's messages are computed one after the other.
    Those that took longest when they were last asked begin: who begins last had better
    be soon done (Graham, SIAM J. Appl. Math. 17, 1969).

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
    processes
        Further processes in which the same ClientApp computes, of all devices.
    """

    def __init__(
        self,
        apps: Mapping[int, ClientApp],
        node_configs: Mapping[int, Mapping[str, Any]],
        run: Run,
        run_config: Mapping[str, Any],
        device_threads: int | None = None,
        processes: Sequence[DeviceProcess] = (),
    ) -> None:
        self.apps = apps
        self.node_configs = node_configs
        self._run = run
        self._run_config = run_config
        self._device_threads = device_threads
        self._processes = processes
        self._threads = ThreadPoolExecutor(max(1, len(processes)))
        # Held by who has a device compute in this process.
        self._turn = Lock()
        # Of devices that have answered, by node id; and how long they took last.
        self._contexts: dict[int, Context] = {}
        self._took_s: dict[int, float] = {}
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
        return self._replies([m for m in waiting if m is not None], lambda: False)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages; return the replies that come in time, in the order sent.

        A device that computes is not interrupted; those whose turn would come after
        the timeout are not asked.
        """
        begun_s = time.monotonic()
        return self._replies([*messages], lambda: _is_over(begun_s, timeout))

    def _replies(
        self, messages: Sequence[Message], is_over: Callable[[], bool]
    ) -> list[Message]:
        """Return the replies that are there before the time is over."""
        by_node: dict[int, list[tuple[int, Message]]] = {}
        for place, message in enumerate(messages):
            node = message.metadata.dst_node_id
            by_node.setdefault(node, []).append((place, message))
        nodes = [*by_node]
        if self._processes:
            nodes.sort(key=lambda node: -self._took_s.get(node, math.inf))
        left = deque(by_node[node] for node in nodes)
        replies: dict[int, Message] = {}

        def work(turn: Lock, deliver: Callable[[Message], Message]) -> None:
            # A strategy may ask in several threads.
            with turn:
                while left and not is_over():
                    try:
                        own = left.popleft()
                    except IndexError:
                        return
                    for place, message in own:
                        reply = None if is_over() else deliver(message)
                        if reply is not None and not is_over():
                            replies[place] = reply

        def work_there(process: DeviceProcess) -> None:
            try:
                # Until then the devices are this process's.
                with process.turn:
                    while left and not process.is_ready():
                        pass
                work(process.turn, partial(self._deliver, compute=process.answer))
                process.forget()
            except BaseException:
                # Without it the run ends, and no further device computes.
                left.clear()
                raise

        beside = self._processes[: max(0, len(left) - 1)]
        working = [self._threads.submit(work_there, process) for process in beside]
        work(self._turn, self._deliver)
        for worker in working:
            worker.result()
        return [replies[place] for place in sorted(replies)]

    def _deliver(self, message: Message, compute: _Answer | None = None) -> Message:
        """Return the reply of a device; without ``compute``, of one of this process."""
        _named(message)
        node = message.metadata.dst_node_id
        begun_s = time.monotonic()
        reply, context = (compute or self._answer_here)(message, self._context(node))
        self._took_s[node] = time.monotonic() - begun_s
        if context is not None:
            self._contexts[node] = context
        _named(reply)
        return reply

    def _answer_here(
        self, message: Message, context: Context
    ) -> tuple[Message, Context | None]:
        # The bytes of arrays are shared, since nobody can change them.
        given = copy.deepcopy((message, context))

        def app(message: Message, context: Context) -> Message:
            # A node that has left since it was asked answers with an error, too.
            return self.apps[context.node_id](message, context)

        reply, left = answer(app, *given, self._device_threads)
        return copy.deepcopy(reply), left

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
