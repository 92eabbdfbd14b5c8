"""What goes between the server's process of a simulation and the others.

A frame is a kind and parts, the parts' lengths before them. A message and the context
that goes with it are Flower's protobuf messages. The bytes of their arrays are parts of
their own: protobuf would copy them, and ends at 2 GiB.
"""

from __future__ import annotations

import copy
import socket
import struct
import threading
from collections.abc import Iterator, Sequence

from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.common.serde import (
    context_from_proto,
    context_to_proto,
    message_from_proto,
    message_to_proto,
)
from flwr.proto.message_pb2 import Context as ContextProto
from flwr.proto.message_pb2 import Message as MessageProto

# Kinds of frames: what a process is told first, that it is ready, a message for a
# device, its reply, and a line for the log.
START, READY, ASK, ANSWER, LOG = b"s", b"r", b"?", b"!", b"l"

_HEAD = struct.Struct("!cI")

Parts = Sequence[bytes]


class Link:
    """Carries frames over a socket, either way.

    Parameters
    ----------
    connection
        The socket.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._sending = threading.Lock()

    def send(self, kind: bytes, *parts: bytes) -> None:
        """Send a frame.

        Raises
        ------
        OSError
            The other end is gone.
        """
        lengths = struct.pack(f"!{len(parts)}Q", *map(len, parts))
        with self._sending:
            self.connection.sendall(_HEAD.pack(kind, len(parts)) + lengths)
            for part in parts:
                self.connection.sendall(part)

    def receive(self) -> tuple[bytes, list[bytes]]:
        """Wait for a frame.

        Raises
        ------
        EOFError
            The other end is gone.
        """
        kind, count = _HEAD.unpack(self._read(_HEAD.size))
        lengths = struct.unpack(f"!{count}Q", self._read(8 * count))
        return kind, [self._read(length) for length in lengths]

    def _read(self, length: int) -> bytes:
        pieces: list[bytes] = []
        while length:
            try:
                piece = self.connection.recv(length, socket.MSG_WAITALL)
            except OSError:
                piece = b""
            if not piece:
                raise EOFError
            pieces.append(piece)
            length -= len(piece)
        # As a rule there is one piece, which is not copied.
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


class Outbox:
    """Makes parts of messages; those of arrays that the last message had are numbers.

    The devices of a round are sent the same values as a rule, which so travel once.
    """

    def __init__(self) -> None:
        self._last: list[bytes] = []

    def parts(self, message: Message, context: Context | None) -> Iterator[bytes]:
        """Give the parts of a message, and of a context if there is one."""
        arrays: list[bytes] = []
        bare = message
        if message.has_content():
            bare = copy.copy(message)
            bare.content = _bare(message.content, arrays)
        yield bytes(message_to_proto(bare).SerializeToString())
        if context is None:
            yield b""
        else:
            left = copy.copy(context)
            left.state = _bare(context.state, arrays)
            yield bytes(context_to_proto(left).SerializeToString())
        known = {id(array): place for place, array in enumerate(self._last)}
        places = [known.get(id(array), -1) for array in arrays]
        self._last = arrays
        yield struct.pack(f"!{len(places)}q", *places)
        yield from (a for a, place in zip(arrays, places, strict=True) if place < 0)

    def forget(self) -> None:
        """Hold the last message's arrays no longer."""
        self._last = []


class Inbox:
    """Makes messages of the parts that an `Outbox` at the other end gives."""

    def __init__(self) -> None:
        self._last: list[bytes] = []

    def message(self, parts: Parts) -> tuple[Message, Context | None]:
        """Return a message, and the context if there is one."""
        first, second, packed, *new = parts
        places = struct.unpack(f"!{len(packed) // 8}q", packed)
        come = iter(new)
        last = self._last
        self._last = [last[place] if place >= 0 else next(come) for place in places]
        arrays = iter(self._last)
        message = message_from_proto(MessageProto.FromString(first))
        if message.has_content():
            _fill(message.content, arrays)
        if not second:
            return message, None
        context = context_from_proto(ContextProto.FromString(second))
        _fill(context.state, arrays)
        return message, context


def _bare(records: RecordDict, arrays: list[bytes]) -> RecordDict:
    """Return records whose arrays are empty; what was in them goes to a list."""
    bare = RecordDict()
    for name, record in records.items():
        if isinstance(record, ArrayRecord):
            arrays += [array.data for array in record.values()]
            empty = {
                key: Array(array.dtype, array.shape, array.stype, b"")
                for key, array in record.items()
            }
            bare[name] = ArrayRecord(empty)
        else:
            bare[name] = record
    return bare


def _fill(records: RecordDict, arrays: Iterator[bytes]) -> None:
    """Put the arrays' bytes back, in the order of `_bare`."""
    for record in records.values():
        if isinstance(record, ArrayRecord):
            for array in record.values():
                array.data = next(arrays)
