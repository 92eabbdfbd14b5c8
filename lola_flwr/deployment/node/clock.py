"""Whether a node is refused for its clock, which Flower does not say.

Every request carries the time that it was signed at, and a SuperLink whose clock tells
another answers 401, as to a stranger.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from logging import ERROR
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE
from flwr.supercore import log

if TYPE_CHECKING:
    from flwr.supernode.cli.flower_supernode import SuperNodeLifespanConfig

_ANSWERS_WITHIN_S = 5.0
# Flower's own bounds: a clock that is ahead, and one that is behind (or a slow link).
_MOST_AHEAD_S, _MOST_BEHIND_S = (
    SYSTEM_TIME_TOLERANCE,
    TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE,
)


@contextmanager
def clocks_compared(options: SuperNodeLifespanConfig) -> Iterator[None]:
    """Where Flower ends the process in the ``with``, say whether a clock is why."""
    try:
        yield
    except SystemExit:
        ahead_s = seconds_ahead(options)
        if ahead_s is not None and not -_MOST_BEHIND_S < ahead_s < _MOST_AHEAD_S:
            log(
                ERROR,
                "This host's clock is %.0f s %s the SuperLink's, which refuses (401) "
                "who is more than %d s ahead or %d s behind: set both clocks, as by "
                "NTP.",
                *(abs(ahead_s), "ahead of" if ahead_s > 0 else "behind"),
                *(_MOST_AHEAD_S, _MOST_BEHIND_S),
            )
        raise


def seconds_ahead(options: SuperNodeLifespanConfig) -> float | None:
    """Return how far this host's clock is ahead of the SuperLink's, to a second.

    None where the SuperLink does not answer.
    """
    address = urlsplit(f"//{options.server_address}")
    host, port = address.hostname or "", address.port
    if options.insecure:
        connection = HTTPConnection(host, port, timeout=_ANSWERS_WITHIN_S)
    else:
        roots = options.root_certificates
        context = (
            ssl.create_default_context(cadata=roots.decode("ascii"))
            if isinstance(roots, bytes)
            else ssl.create_default_context(cafile=roots)
        )
        connection = HTTPSConnection(
            host, port, timeout=_ANSWERS_WITHIN_S, context=context
        )
    try:
        connection.request("HEAD", "/")
        said = connection.getresponse().getheader("Date")
        there = None if said is None else parsedate_to_datetime(said)
    except (OSError, HTTPException, ValueError):
        return None
    finally:
        connection.close()
    return None if there is None else (datetime.now(UTC) - there).total_seconds()
