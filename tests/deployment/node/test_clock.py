"""A node that is refused for its clock says so."""

from __future__ import annotations

import logging
import re
import threading
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest

from lola_flwr.deployment.node.clock import clocks_compared, seconds_ahead
from tests.deployment.node.links import free_port


@contextmanager
def server(ahead_s):
    """Serve as a host whose clock is behind by some seconds; give a node's options."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_error(404)

        def date_time_string(self, timestamp=None):
            there = datetime.now(UTC) - timedelta(seconds=ahead_s)
            return format_datetime(there, usegmt=True)

        def log_message(self, *_):
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as served:
        thread = threading.Thread(target=served.serve_forever, args=(0.01,))
        thread.start()
        yield SimpleNamespace(
            server_address=f"127.0.0.1:{served.server_port}",
            insecure=True,
            root_certificates=None,
        )
        served.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("ahead_s", "said"),
    [
        (3600, "360. s ahead of the SuperLink's"),
        (-3600, "3[56].. s behind the SuperLink's"),
        (8, "[89] s ahead of the SuperLink's"),
        (0, None),
        (-250, None),
    ],
)
def test_who_is_refused_for_its_clock_is_told(ahead_s, said, caplog):
    caplog.set_level(logging.INFO, logger="flwr")
    with server(ahead_s) as options:
        assert ahead_s <= seconds_ahead(options) < ahead_s + 3
        with pytest.raises(SystemExit), clocks_compared(options):
            raise SystemExit(1)
    if said is None:
        assert caplog.messages == []
    else:
        (message,) = caplog.messages
        assert re.search(said, message) and "more than 5 s ahead" in message


def test_of_a_server_that_does_not_answer_nothing_is_known():
    options = SimpleNamespace(
        server_address=f"127.0.0.1:{free_port()}",
        insecure=True,
        root_certificates=None,
    )
    assert seconds_ahead(options) is None
