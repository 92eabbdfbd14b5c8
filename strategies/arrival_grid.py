"""A Grid that takes replies as they come, and tells how long each took to come up."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from lola_flwr.strategies.missing_objects import ask_soon_again
from lola_flwr.strategies.simulated_link import few_at_a_time
from lola_flwr.wire.records import holds_nothing, unmarked

# A device's reply is looked for after a part of the time that it has been waited for:
# at least and at most so often, and rarer where there are many devices.
_POLL_PART, _LONGEST_POLL_S = 0.1, 0.25
_LARGEST_POLL_RATE_HZ = 50.0
_THREADS = 64

# How long the replies to messages may take, given after how many seconds those came
# that are there, and how many said besides that their devices failed.
WaitS = Callable[[Sequence[float], int], float]


class Arrival(NamedTuple):
    """When a device's reply came, on the server's clock; None where nothing tells.

    Parameters
    ----------
    answered_s
        Seconds from the messages' sending to the reply's last byte.
    upload_s
        Those of them since the reply was announced.
    """

    answered_s: float | None = None
    upload_s: float | None = None


class ArrivalGrid(Grid):
    """Wraps the Grid of a ServerApp.

    In deployment Flower's own ``send_and_receive`` looks for replies every 3 s, and
    fetches one after the other: a reply is handed out as soon as it is announced, and
    fetching it waits for its last byte, while those of faster devices lie there. Here
    every device is waited for by itself. Since a device announces its reply just before
    it sends the arrays, the fetch takes as long as the upload does, on the server's
    clock alone.

    In a simulation nothing is uploaded. Flower's is sent a few messages at a time, and
    any other Grid does it all.

    Parameters
    ----------
    grid
        The Grid to send through.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        # Of the latest replies, by node id.
        self.arrivals: dict[str, Arrival] = {}

    def set_run(self, run: Run) -> None:
        """Set the run."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """The run."""
        return self._grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message, as the wrapped Grid does."""
        return self._grid.create_message(
            content, message_type, dst_node_id, group_id, ttl
        )

    def get_node_ids(self) -> Iterable[int]:
        """Return the connected nodes."""
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages without waiting."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that are there."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages; return the replies that come in time, in the order sent."""
        return self.receive(messages, lambda *_: math.inf, timeout)

    def receive(
        self, messages: Iterable[Message], wait_s: WaitS, timeout: float | None
    ) -> Iterable[Message]:
        """Send messages; return the replies that come in time, in the order sent.

        Parameters
        ----------
        messages
            The messages.
        wait_s
            How long to wait for them; asked again whenever one comes, where each is
            waited for by itself.
        timeout
            How long to wait at most, seconds; None: as long as ``wait_s`` says.
        """
        longest_s = math.inf if timeout is None else timeout
        self.arrivals = {}
        if not _is_flowers(self._grid, "HttpGrid"):
            longest_s = min(longest_s, wait_s((), 0))
            if _is_flowers(self._grid, "InMemoryGrid"):
                return few_at_a_time(self._grid, [*messages], longest_s)
            # Flower adds the timeout to the present, which infinity has no place in.
            return self._grid.send_and_receive(
                messages, timeout=None if math.isinf(longest_s) else longest_s
            )
        ask_soon_again()
        ids = [i for i in self.push_messages(list(messages)) if i]
        arrivals = _Arrivals(
            self._grid, ids, lambda *there: min(longest_s, wait_s(*there))
        )
        replies = arrivals.wait()
        self.arrivals = {
            str(reply.metadata.src_node_id): arrival
            for reply, arrival in replies
            if not reply.has_error()
        }
        return [reply for reply, _ in replies]


def _is_flowers(grid: Grid, kind: str) -> bool:
    """Tell whether a Grid is of a class of Flower's SuperLink.

    To import that takes a web server and SQL; where there is one, it has been done.
    """
    superlink = sys.modules.get("flwr.superlink.grid")
    return superlink is not None and isinstance(grid, getattr(superlink, kind))


def seconds_of(
    arrivals: ArrivalGrid | None, device_id: str
) -> Mapping[str, float | None]:
    """Return when a device's latest reply came, as ``Arrival`` names the figures."""
    known = {} if arrivals is None else arrivals.arrivals
    return known.get(device_id, Arrival())._asdict()


def _has_failed(reply: Message) -> bool:
    """Tell whether a device says that it did not do what it was asked for."""
    if reply.has_error():
        return True
    records = reply.content.config_records.values()
    return any(holds_nothing(unmarked(record)) for record in records)


class _Arrivals:
    """Waits for the replies to some messages, in threads.

    A thread that is still fetching when the time is up is left behind: its reply is
    late, and nobody looks at it any more.
    """

    def __init__(self, grid: Grid, ids: Sequence[str], wait_s: WaitS) -> None:
        self._grid = grid
        self._ids = ids
        self._wait_s = wait_s
        self._begun_s = time.monotonic()
        self._shortest_poll_s = len(ids) / _LARGEST_POLL_RATE_HZ
        self._changed = threading.Condition()
        self._replies: dict[str, tuple[Message, Arrival]] = {}
        self._failure: BaseException | None = None
        self._over = False

    def wait(self) -> list[tuple[Message, Arrival]]:
        """Return what comes in time, and when it did."""
        groups = [self._ids[start::_THREADS] for start in range(_THREADS)]
        for group in filter(None, groups):
            threading.Thread(target=self._fetch, args=(group,), daemon=True).start()
        with self._changed:
            while self._failure is None and len(self._replies) < len(self._ids):
                left_s = self._begun_s + self._longest_s() - time.monotonic()
                if left_s <= 0.0:
                    break
                self._changed.wait(min(left_s, threading.TIMEOUT_MAX))
            self._over = True
            if self._failure is not None:
                raise self._failure
            return [self._replies[i] for i in self._ids if i in self._replies]

    def _longest_s(self) -> float:
        came_s = [
            arrival.answered_s
            for reply, arrival in self._replies.values()
            if arrival.answered_s is not None and not _has_failed(reply)
        ]
        return self._wait_s(came_s, len(self._replies) - len(came_s))

    def _fetch(self, group: Sequence[str]) -> None:
        missing = set(group)
        # In a larger group a reply waits until the one before it is there.
        is_timed = len(group) == 1
        try:
            while missing and not self._over:
                asked_s = time.monotonic()
                for reply in self._grid.pull_messages(missing):
                    answered = reply.metadata.reply_to_message_id
                    missing.discard(answered)
                    with self._changed:
                        now_s = time.monotonic()
                        arrival = Arrival(
                            now_s - self._begun_s, now_s - asked_s if is_timed else None
                        )
                        self._replies[answered] = (reply, arrival)
                        self._changed.notify()
                if missing:
                    waited_s = time.monotonic() - self._begun_s
                    poll_s = min(_POLL_PART * waited_s, _LONGEST_POLL_S)
                    time.sleep(max(poll_s, self._shortest_poll_s))
        # Whatever Flower raises ends the round, as it would without threads.
        except BaseException as error:
            with self._changed:
                self._failure = error
                self._changed.notify()
