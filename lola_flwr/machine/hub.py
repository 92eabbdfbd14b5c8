"""Whether the hub that models and data sets come from can be reached."""

from __future__ import annotations

import os
import socket
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

_WAIT_S = 3.0


def hub_host() -> str:
    """Return the hub's name, or that of what stands in for it here."""
    return _endpoint()[0]


def why_no_hub() -> str | None:
    """Return why the hub cannot be reached; None if it can, as far as a moment tells.

    Its own client tries for half a minute.
    """
    host, port, scheme = _endpoint()
    if scheme in getproxies() and not proxy_bypass(host):
        return None
    try:
        with socket.create_connection((host, port), timeout=_WAIT_S):
            return None
    except OSError as error:
        return f"{host} cannot be reached, {type(error).__name__}"


def _endpoint() -> tuple[str, int, str]:
    parts = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    port = parts.port or (80 if parts.scheme == "http" else 443)
    return parts.hostname or "", port, parts.scheme
