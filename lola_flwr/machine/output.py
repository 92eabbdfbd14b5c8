"""What a library's compiled code prints, kept out of the program's output."""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_STDOUT = 1
_one_at_a_time = threading.Lock()


@contextmanager
def stdout_without(prefix: str) -> Iterator[None]:
    """Leave out lines of standard output that begin so, whoever prints them.

    What else is printed meanwhile, by other threads, comes after.

    Parameters
    ----------
    prefix
        How the lines begin.
    """
    with _one_at_a_time, tempfile.TemporaryFile() as kept:
        _flush()
        try:
            stdout = os.dup(_STDOUT)
        except OSError:  # a service without output
            yield
            return
        os.dup2(kept.fileno(), _STDOUT)
        try:
            yield
        finally:
            _flush()
            os.dup2(stdout, _STDOUT)
            kept.seek(0)
            lines = (line for line in kept if not line.startswith(prefix.encode()))
            with os.fdopen(stdout, "wb") as output:
                output.writelines(lines)


def _flush() -> None:
    """Have C's library write what it holds back where output is no terminal."""
    if sys.platform != "win32":
        ctypes.CDLL(None).fflush(None)
