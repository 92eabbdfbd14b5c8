"""End a node's worker that hangs, whatever the node is at.

A message that is handed to a worker shows whether it hangs. But the worker also holds
the relay through which the node sends: where it hangs between two messages, or while
an update is under way, it takes the node's connection with it, and nobody asks it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from logging import WARNING
from pathlib import Path

from flwr.supercore import log

from lola_flwr.deployment.worker_link import (
    HANGS_S,
    Frame,
    LinkError,
    Silent,
    ask,
)
from lola_flwr.errors import UserError

_LOOK_S = 5.0


@contextmanager
def tended(
    socket_path: Path, *, look_s: float = _LOOK_S, hangs_s: float = HANGS_S
) -> Iterator[None]:
    """Ask a worker again and again whether it is there, and end it if it hangs.

    Parameters
    ----------
    socket_path
        Where it listens. While none does, there is nothing to do.
    look_s
        Seconds between an answer and the next question.
    hangs_s
        A worker that says nothing for as long is killed: what started it starts the
        next one, or the next message does.
    """
    ends = threading.Event()

    def look() -> None:
        while not ends.wait(look_s):
            try:
                ask(socket_path, Frame("status"), hangs_s=hangs_s)
            except Silent as error:
                log(WARNING, "The worker hangs and was ended: %s", error)
            # Whose message needs the worker says what is wrong with it.
            except (LinkError, UserError):
                continue

    threading.Thread(target=look, name="tends-worker", daemon=True).start()
    try:
        yield
    finally:
        ends.set()
