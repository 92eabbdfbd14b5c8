"""How a client and the resident worker of its device talk: frames over a Unix socket.

A frame is a header in JSON, with bytes as base64, and the raw bytes of the arrays that
it lists; nothing is pickled. The worker's socket and the file with its token are
readable by their owner alone, and every connection begins with the token: the socket
may stand in a directory that others can enter.
"""

from __future__ import annotations

import hmac
import json
import math
import os
import signal
import socket
import stat
import struct
import threading
import time
from base64 import b64decode, b64encode
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lola_flwr.errors import UserError
from lola_flwr.machine.files import replacing

Arrays = Mapping[str, npt.NDArray[Any]]

# Both ends are of one release, but a worker can outlive an upgrade.
VERSION = 3
_PREFIX = struct.Struct("!4sHI")  # magic, version, bytes of the header
_MAGIC = b"LOLA"
_LARGEST_HEADER_BYTES = 16 << 20
_LARGEST_ARRAYS_BYTES = 64 << 30
# Of a hello, which comes from whoever can open the socket.
_LARGEST_HELLO_BYTES = 1024
_DTYPE_KINDS = "fiub"
# What bytes are in JSON: an object with this key.
_BASE64 = "base64"
_BUSY_S = 0.05
# Who is asked says so often that it is at it; who says nothing for as long hangs.
_AT_IT = "at-it"
_BEAT_S, HANGS_S = 2.0, 30.0
# A killed process ends within it, unless the system itself is stuck.
_GONE_S = 5.0


class LinkError(ConnectionError):
    """The other end is gone, or does not speak this protocol."""


class Silent(LinkError):
    """The other end is there, and says nothing."""


@dataclass(frozen=True, eq=False)
class Frame:
    """One message.

    Parameters
    ----------
    kind
        What it is: ``"train"``, ``"update"``, ``"error"``, ...
    header
        Its values, of the types that JSON knows, or bytes.
    arrays
        Its arrays by name.
    """

    kind: str
    header: Mapping[str, Any] = field(default_factory=dict)
    arrays: Arrays = field(default_factory=dict)


def send_frame(connection: socket.socket, frame: Frame) -> None:
    """Send one frame.

    Raises
    ------
    LinkError
        The other end is gone.
    """
    arrays = {n: np.ascontiguousarray(values) for n, values in frame.arrays.items()}
    header = json.dumps(
        {
            "kind": frame.kind,
            "header": frame.header,
            "arrays": [[n, a.dtype.str, a.shape] for n, a in arrays.items()],
        },
        default=_bytes_as_text,
    ).encode()
    try:
        connection.sendall(_PREFIX.pack(_MAGIC, VERSION, len(header)) + header)
        for values in arrays.values():
            # Only an array with a dimension can be seen as bytes.
            connection.sendall(values.reshape(-1).view(np.uint8).data)
    except OSError as error:
        raise LinkError(f"The other end is gone ({error}).") from None


def _bytes_as_text(value: object) -> dict[str, str]:
    if not isinstance(value, bytes):
        raise TypeError(f"{type(value).__name__} has no place in a frame's header.")
    return {_BASE64: b64encode(value).decode()}


def _text_as_bytes(values: dict[str, Any]) -> dict[str, Any] | bytes:
    if values.keys() != {_BASE64}:
        return values
    return b64decode(values[_BASE64], validate=True)


def receive_frame(
    connection: socket.socket,
    *,
    largest_header_bytes: int = _LARGEST_HEADER_BYTES,
    largest_arrays_bytes: int = _LARGEST_ARRAYS_BYTES,
) -> Frame:
    """Wait for one frame.

    Parameters
    ----------
    connection
        Where from.
    largest_header_bytes, largest_arrays_bytes
        A frame that announces more is refused before memory is taken for it.

    Raises
    ------
    LinkError
        The connection ended, or what came is no frame.
    """
    prefix = _receive(connection, _PREFIX.size)
    magic, version, header_bytes = _PREFIX.unpack(prefix)
    if magic != _MAGIC or header_bytes > largest_header_bytes:
        raise LinkError("The other end does not speak the worker's protocol.")
    if version != VERSION:
        raise LinkError(
            f"The other end speaks version {version} of the worker's protocol, this "
            f"one {VERSION}; restart the worker after an upgrade."
        )
    try:
        content = json.loads(
            _receive(connection, header_bytes), object_hook=_text_as_bytes
        )
        kind, header = str(content["kind"]), dict(content["header"])
        listed = [
            (str(name), np.dtype(dtype), tuple(int(size) for size in shape))
            for name, dtype, shape in content["arrays"]
        ]
    # A header that is none fails in many ways, which all mean the same.
    except (ValueError, LookupError, TypeError) as error:
        raise LinkError(f"Malformed header ({error}).") from None
    total_bytes = 0
    for name, dtype, shape in listed:
        total_bytes += math.prod(shape) * dtype.itemsize
        if dtype.kind not in _DTYPE_KINDS or any(size < 0 for size in shape):
            raise LinkError(f"Array {name!r} of type {dtype} and shape {shape}.")
    if total_bytes > largest_arrays_bytes:
        raise LinkError(f"Arrays of {total_bytes} B announced.")
    arrays = {}
    for name, dtype, shape in listed:
        arrays[name] = np.empty(shape, dtype)
        _receive_into(connection, arrays[name].reshape(-1).view(np.uint8).data)
    return Frame(kind, header, arrays)


@contextmanager
def at_it(connection: socket.socket) -> Iterator[None]:
    """Tell who asked, again and again, that the answer is being worked at."""
    done = threading.Event()

    def beat() -> None:
        # Who has gone is noticed when the answer is sent.
        with suppress(LinkError):
            while not done.wait(_BEAT_S):
                send_frame(connection, Frame(_AT_IT))

    beating = threading.Thread(target=beat, daemon=True)
    beating.start()
    try:
        yield
    finally:
        done.set()
        beating.join()


def receive_answer(connection: socket.socket, *, hangs_s: float = HANGS_S) -> Frame:
    """Wait for the answer of who says that it is at it.

    Parameters
    ----------
    connection
        Where from.
    hangs_s
        For how long nothing may be said.

    Raises
    ------
    Silent
        Nothing was said for so long.
    LinkError
        As for `receive_frame`.
    """
    connection.settimeout(hangs_s)
    while (frame := receive_frame(connection)).kind == _AT_IT:
        pass
    return frame


def ask(socket_path: Path, asked: Frame, *, hangs_s: float = HANGS_S) -> Frame:
    """Ask the worker at a socket, and wait for its answer; end it if it hangs.

    Parameters
    ----------
    socket_path
        Where it listens.
    asked
        What it is asked.
    hangs_s
        A worker that says nothing for as long is killed: what started it starts the
        next one.

    Raises
    ------
    Silent
        It hung, and is ended.
    LinkError
        None answers there, or it ended meanwhile.
    UserError
        As for `connect`.
    """
    with connect(socket_path) as connection:
        send_frame(connection, asked)
        try:
            return receive_answer(connection, hangs_s=hangs_s)
        except Silent:
            _end(connection)
            raise


def _end(connection: socket.socket) -> None:
    """Kill the process at the other end, where the system tells which that is."""
    if not hasattr(socket, "SO_PEERCRED"):
        return
    credentials = struct.Struct("3i")
    found = connection.getsockopt(
        socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size
    )
    pid, _, _ = credentials.unpack(found)
    # 0: it is in a container that this process does not see into.
    if pid > 0:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        # Until its last thread has gone it listens still, and would take the next
        # question with it. Its sockets end together.
        connection.settimeout(_GONE_S)
        with suppress(OSError):
            while connection.recv(_PREFIX.size):
                pass


def token_path(socket_path: Path) -> Path:
    """Return where the token of a worker is, by its socket."""
    return socket_path.with_name(f"{socket_path.name}.token")


def write_token(socket_path: Path, token: str) -> None:
    """Write a worker's token, for its owner's eyes only."""
    # A client that looks while it is written must not take half a token for the whole.
    with replacing(token_path(socket_path)) as path:
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(token)


def connect(socket_path: Path, *, timeout_s: float = 5.0) -> socket.socket:
    """Connect to the worker at a socket and show its token.

    The connection has no time-out of its own: training takes as long as it takes, and
    the end of the worker ends the connection.

    Raises
    ------
    LinkError
        No worker answers there.
    UserError
        Others can read the token, or it or the socket is another user's.
    """
    path = token_path(socket_path)
    try:
        status = path.stat()
        owners = {status.st_uid, socket_path.stat().st_uid}
        token = path.read_text(encoding="ascii")
    except FileNotFoundError:
        raise LinkError(f"No worker runs at {socket_path}.") from None
    except PermissionError:
        raise UserError(
            f"{path} cannot be read: run worker and SuperNode as the same user."
        ) from None
    if owners != {os.geteuid()}:
        raise UserError(
            f"{socket_path} or its token is another user's: run worker and SuperNode "
            "as the same user, and ask or stop the worker as that one."
        )
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077:
        raise UserError(
            f"{path} has mode {mode:o}, which lets others read it; restart the worker."
        )
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(timeout_s)
    end = time.monotonic() + timeout_s
    while True:
        try:
            connection.connect(str(socket_path))
            break
        except BlockingIOError:  # its queue is full
            if time.monotonic() > end:
                connection.close()
                raise LinkError(
                    f"The worker at {socket_path} has been busy for {timeout_s:g} s."
                ) from None
            time.sleep(_BUSY_S)
        except OSError as error:
            connection.close()
            raise LinkError(f"No worker runs at {socket_path} ({error}).") from None
    connection.settimeout(None)
    send_frame(connection, Frame("hello", {"token": token}))
    return connection


def admits(connection: socket.socket, token: str) -> bool:
    """Tell whether the other end begins with the token."""
    hello = receive_frame(
        connection,
        largest_header_bytes=_LARGEST_HELLO_BYTES,
        largest_arrays_bytes=0,
    )
    shown = hello.header.get("token")
    return (
        hello.kind == "hello"
        and isinstance(shown, str)
        and hmac.compare_digest(shown.encode(), token.encode())
    )


def _receive(connection: socket.socket, count: int) -> bytes:
    buffer = bytearray(count)
    _receive_into(connection, memoryview(buffer))
    return bytes(buffer)


def _receive_into(connection: socket.socket, view: memoryview) -> None:
    while view:
        try:
            received = connection.recv_into(view)
        except TimeoutError:
            waited_s = connection.gettimeout()
            raise Silent(f"The other end says nothing for {waited_s:g} s.") from None
        except OSError as error:
            raise LinkError(f"The other end is gone ({error}).") from None
        if not received:
            raise LinkError("The other end is gone.")
        view = view[received:]
