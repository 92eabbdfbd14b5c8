"""A Grid that takes replies as they come, and tells how long each took to come up."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.superlink.grid import HttpGrid

from lola_flwr.strategies.missing_objects import ask_soon_again

# A device's reply is looked for after a part of the time that it has been waited for:
# at least and at most so often, and rarer where there are many devices.
_POLL_PART, _LONGEST_POLL_S = 0.1, 0.25
_LARGEST_POLL_RATE_HZ = 50.0
_THREADS = 64


class ArrivalGrid(Grid):
    """Wraps the Grid of a ServerApp.

    In deployment Flower's own ``send_and_receive`` looks for replies every 3 s, and
    fetches one after the other: a reply is handed out as soon as it is announced, and
    fetching it waits for its last byte, while those of faster devices lie there. Here
    every device is waited for by itself. Since a device announces its reply just before
    it sends the arrays, the fetch takes as long as the upload does, on the server's
    clock alone.

    In a simulation nothing is uploaded, and the wrapped Grid does it all.

    Parameters
    ----------
    grid
        The Grid to send through.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        # Seconds of the latest upload, by node id.
        self.upload_s: dict[str, float] = {}

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
        self.upload_s = {}
        if not isinstance(self._grid, HttpGrid):
            return self._grid.send_and_receive(messages, timeout=timeout)
        ask_soon_again()
        ids = [i for i in self.push_messages(list(messages)) if i]
        arrivals = _Arrivals(self._grid, ids, timeout)
        replies = arrivals.wait()
        self.upload_s = {
            str(reply.metadata.src_node_id): upload_s
            for reply, upload_s in replies
            if upload_s is not None and not reply.has_error()
        }
        return [reply for reply, _ in replies]


def upload_seconds(arrivals: ArrivalGrid | None, device_id: str) -> float | None:
    """Return how long a device's latest upload took; None where nothing tells."""
    return None if arrivals is None else arrivals.upload_s.get(device_id)


class _Arrivals:
    """Waits for the replies to some messages, in threads.

    A thread that is still fetching when the time is up is left behind: its reply is
    late, and nobody looks at it any more.
    """

    def __init__(self, grid: Grid, ids: Sequence[str], timeout_s: float | None) -> None:
        self._grid = grid
        self._ids = ids
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._shortest_poll_s = len(ids) / _LARGEST_POLL_RATE_HZ
        self._changed = threading.Condition()
        self._replies: dict[str, tuple[Message, float | None]] = {}
        self._failure: BaseException | None = None
        self._over = False

    def wait(self) -> list[tuple[Message, float | None]]:
        """Return what comes in time, and how long each upload took if that is known."""
        groups = [self._ids[start::_THREADS] for start in range(_THREADS)]
        for group in filter(None, groups):
            threading.Thread(target=self._fetch, args=(group,), daemon=True).start()
        with self._changed:
            self._changed.wait_for(
                lambda: self._failure or len(self._replies) == len(self._ids),
                None if self._deadline is None else self._deadline - time.monotonic(),
            )
            self._over = True
            if self._failure is not None:
                raise self._failure
            return [self._replies[i] for i in self._ids if i in self._replies]

    def _fetch(self, group: Sequence[str]) -> None:
        missing = set(group)
        # In a larger group a reply waits until the one before it is there.
        is_timed = len(group) == 1
        begun_s = time.monotonic()
        try:
            while missing and not self._over:
                asked_s = time.monotonic()
                for reply in self._grid.pull_messages(missing):
                    answered = reply.metadata.reply_to_message_id
                    missing.discard(answered)
                    with self._changed:
                        taken_s = time.monotonic() - asked_s
                        self._replies[answered] = (reply, taken_s if is_timed else None)
                        self._changed.notify()
                if missing:
                    waited_s = time.monotonic() - begun_s
                    poll_s = min(_POLL_PART * waited_s, _LONGEST_POLL_S)
                    time.sleep(max(poll_s, self._shortest_poll_s))
        # Whatever Flower raises ends the round, as it would without threads.
        except BaseException as error:
            with self._changed:
                self._failure = error
                self._changed.notify()
