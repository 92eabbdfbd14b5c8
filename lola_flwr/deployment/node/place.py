"""The place that a node's key has at the SuperLink, which a killed node still holds.

A SuperLink believes in a node until two of its heartbeats are missing, for a minute,
and so long refuses another one with the same key: a device whose node was killed would
stay away from many rounds. Its successor here gives that place up first.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from logging import INFO, WARNING
from typing import IO, TYPE_CHECKING, Any

from flwr.proto.fleet_pb2 import DeactivateNodeRequest
from flwr.supercore import log
from flwr.supercore.interceptors.http.runtime_version import (
    RuntimeVersionHttpInterceptor,
)
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from lola_flwr.deployment.node.stopping import Stop
from lola_flwr.machine.files import local_path, writing

if TYPE_CHECKING:
    from flwr.supernode.cli.flower_supernode import SuperNodeLifespanConfig

_BELIEVED_S, _AGAIN_S = 60.0, 1.0


class Place:
    """A key's place at a SuperLink, as long as no other process here has it.

    Parameters
    ----------
    options
        Flower's own reading of the command line.
    keys
        The key's private and its public half.
    note
        File, locked for this process, with the number of the node that was active last;
        empty if that one has left.
    """

    def __init__(
        self, options: SuperNodeLifespanConfig, keys: tuple[Any, Any], note: IO[str]
    ) -> None:
        self._options, self._keys, self._note = options, keys, note

    def vacate(self, stop: Stop) -> None:
        """Say that the node that was active last has left, if it could not.

        Parameters
        ----------
        stop
            Whether this one is to end.
        """
        self._note.seek(0)
        left = self._note.read()
        begun_s = time.monotonic()
        # After a minute the SuperLink has noticed by itself.
        while left.isdecimal() and time.monotonic() < begun_s + _BELIEVED_S:
            try:
                self._deactivate(int(left))
                log(INFO, "Node %s ended without leaving; this one follows it.", left)
                return
            # Flower's client raises what httpx does; only an answer has a response.
            except Exception as error:
                if hasattr(error, "response"):
                    log(INFO, "Node %s is not active.", left)
                    return
                log(WARNING, "The SuperLink does not answer: %s", error)
            if stop.is_asked:
                return
            stop.sleep(_AGAIN_S)

    def _deactivate(self, node_id: int) -> None:
        private_key, public_key = self._keys
        with FleetHttpClient.from_server_address(
            self._options.server_address,
            self._options.insecure,
            self._options.root_certificates,
            [
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                NodeAuthHttpInterceptor(private_key, public_key),
            ],
        ) as client:
            client.DeactivateNode(DeactivateNodeRequest(node_id=node_id))

    def take(self, node_id: int) -> None:
        """Note which node is active now."""
        self._write(str(node_id))

    def leave(self) -> None:
        """Note that it has left."""
        self._write("")

    def _write(self, text: str) -> None:
        self._note.seek(0)
        self._note.truncate()
        self._note.write(text)
        self._note.flush()


@contextmanager
def place_of(options: SuperNodeLifespanConfig) -> Iterator[Place | None]:
    """Hold the place of a node's key against other processes of this machine.

    Parameters
    ----------
    options
        Flower's own reading of the command line.

    Yields
    ------
    The place; None without a key, whose node is a new one each time, and where another
    process holds it: that one may be alive, and the SuperLink decides.
    """
    if options.authentication_keys is None:
        yield None
        return
    _, public_key = options.authentication_keys
    named = options.server_address.encode() + public_key_to_bytes(public_key)
    home = local_path(os.environ.get("FLWR_HOME", "~/.flwr"))
    path = home / "lola-flwr" / "nodes" / hashlib.sha256(named).hexdigest()
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Made if it is not there, and left as it is if it is.
        note = path.open("a+", encoding="ascii")
    with note:
        try:
            # The system gives it back when the process ends, however it ends.
            fcntl.flock(note, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield None
            return
        yield Place(options, options.authentication_keys, note)
