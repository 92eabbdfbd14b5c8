"""A process in which devices of a simulation compute, beside that of the server.

``python -m lola_flwr.simulation.device_process FD`` is told over the socket FD what to
run. It ends when the other end of the socket does, whatever it is doing.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
from contextlib import suppress
from pkgutil import resolve_name
from queue import SimpleQueue

from flwr.common.logger import FLOWER_LOGGER
from flwr.supercore.task_identity import TaskIdentity

from lola_flwr.machine.heap import nothing_collected
from lola_flwr.simulation.answering import answer
from lola_flwr.simulation.flower_app import quiet
from lola_flwr.simulation.link import ANSWER, LOG, READY, Inbox, Link, Outbox, Parts


def main() -> None:
    """Answer messages until nobody sends any."""
    link = Link(socket.socket(fileno=int(sys.argv[1])))
    asked: SimpleQueue[Parts] = SimpleQueue()
    _, (told,) = link.receive()
    threading.Thread(target=_listen, args=(link, asked), daemon=True).start()
    FLOWER_LOGGER.handlers = [_ToServer(link)]
    start = json.loads(told)
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = start["identity"]
    sys.path.insert(0, start["directory"])
    with nothing_collected():
        app = resolve_name(start["clientapp"])
        if start["prepare"] is not None:
            # What fails here fails again in a device, which says so.
            with suppress(Exception), quiet():
                resolve_name(start["prepare"])(start["config"])
    link.send(READY)
    inbox = Inbox()
    while True:
        message, context = inbox.message(asked.get())
        assert context is not None
        reply, left = answer(app, message, context)
        link.send(ANSWER, *Outbox().parts(reply, left))


def _listen(link: Link, asked: SimpleQueue[Parts]) -> None:
    """Take messages in; end the process as soon as the other end is gone."""
    try:
        while True:
            asked.put(link.receive()[1])
    except EOFError:
        # A device may be computing, which nothing else would end.
        os._exit(0)


class _ToServer(logging.Handler):
    """Has the server's process log what is logged here."""

    def __init__(self, link: Link) -> None:
        super().__init__()
        self._link = link

    def emit(self, record: logging.LogRecord) -> None:
        said = self.format(record)
        self._link.send(LOG, str(record.levelno).encode(), said.encode())


if __name__ == "__main__":
    main()
