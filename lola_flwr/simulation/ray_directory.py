"""Where Ray, Flower's simulation engine, keeps its files."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lola_flwr.errors import UserError

# Of a Unix socket, by the system; and of the directory that Ray is given for its own.
_LONGEST_SOCKET_BYTES = 103 if sys.platform == "darwin" else 107
_DEEPEST_BYTES = _LONGEST_SOCKET_BYTES - len(
    "/ray/session_YYYY-mm-dd_HH-MM-SS_ffffff_1234567/sockets/plasma_store"
)


@contextmanager
def ray_environment(short: Path = Path("/tmp")) -> Iterator[dict[str, str]]:
    """Give what Ray shall find in its environment: a directory that is not too deep.

    Ray puts sockets under ``RAY_TMPDIR`` or ``TMPDIR``, and where these are as deep as
    batch systems make them, the system refuses the sockets' paths.

    Parameters
    ----------
    short
        Where to make a directory if it must be another one; it is removed in the end.

    Raises
    ------
    UserError
        All of them are too deep, or nothing can be made there.
    """
    # Ray's own usage statistics.
    found = {"RAY_USAGE_STATS_ENABLED": "0"}
    # As Ray looks for it.
    given = os.environ.get("RAY_TMPDIR", os.environ.get("TMPDIR", "/tmp"))
    if len(os.fsencode(given)) <= _DEEPEST_BYTES:
        yield found
        return
    try:
        directory = tempfile.mkdtemp(prefix="lola-", dir=short)
    except OSError as error:
        raise UserError(
            f"{given} is too deep for Ray, whose sockets' paths would be longer than "
            f"{_LONGEST_SOCKET_BYTES} bytes, and {short} cannot be used instead "
            f"({error.strerror}): set RAY_TMPDIR to a directory of at most "
            f"{_DEEPEST_BYTES} bytes."
        ) from None
    try:
        yield {**found, "RAY_TMPDIR": directory}
    finally:
        # Ray's programs may be about to end.
        shutil.rmtree(directory, ignore_errors=True)
