"""What a ClientApp answers to a message, in whichever process it computes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging import ERROR

from flwr.app import Context, Error, Message
from flwr.common.constant import ErrorCode
from flwr.common.logger import log

from lola_flwr.errors import traced


def answer(
    app: Callable[[Message, Context], Message],
    message: Message,
    context: Context,
    threads: int | None = None,
) -> tuple[Message, Context | None]:
    """Return a device's reply, and its context after it; None if its app raised.

    An exception of the app is Flower's error reply.

    Parameters
    ----------
    app
        The device's app.
    message, context
        What it is given, and may change.
    threads
        PyTorch's threads while it computes; None: as many as it has anyway.
    """
    try:
        with _threads(threads):
            return app(message, context), context
    # It is the app's code; Flower's engine answers for it in the same words.
    except Exception as error:
        node = message.metadata.dst_node_id
        log(ERROR, "device %s: %s", node, error, exc_info=traced(error))
        reason = f"{type(error)}:<'{error}'>"
        told = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason)
        return Message(told, reply_to=message), None


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
