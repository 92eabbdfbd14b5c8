"""End a node between two messages, not in one."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# A question that takes longer is one to a SuperLink that is not there.
_ANSWERS_WITHIN_S = 1.0


class Stopped(BaseException):
    """The node is to end at once; no error of an app's, which must not catch it."""


class Stop:
    """Whether a signal has asked the node to end.

    The first lets the message in hand be answered, the second ends it at once; so does
    the first where the SuperLink does not answer.
    """

    def __init__(self) -> None:
        self.is_asked = False
        self._woken = threading.Event()
        self._asking_since_s: float | None = None

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal; of the main thread."""
        since_s = self._asking_since_s
        unanswered = (
            since_s is not None and time.monotonic() - since_s > _ANSWERS_WITHIN_S
        )
        if self.is_asked or unanswered:
            raise Stopped
        self.ask()

    def ask(self) -> None:
        """Ask the node to end after the message in hand."""
        self.is_asked = True
        self._woken.set()

    def sleep(self, seconds: float) -> None:
        """Sleep, but not after a signal."""
        self._woken.wait(seconds)

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Mark a question that the SuperLink answers at once if it is there."""
        self._asking_since_s = time.monotonic()
        try:
            yield
        finally:
            self._asking_since_s = None
