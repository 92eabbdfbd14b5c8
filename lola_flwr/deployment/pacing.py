"""Hold an upload to a rate in user space, without privileges.

Flower has no rate control, and its SuperNode sends from a process that is not ours. But
it connects to any address: a relay on this device stands between SuperNode and
SuperLink, passes the bytes of the TLS connection on as they are (it holds no key and
sees no content), and lets what goes up pass at the rate of the round.

    SuperNode --superlink 127.0.0.1:9095  ->  relay  ->  SuperLink

The SuperLink's certificate must name the relay's address, as those of
``clients/linux/make-keys.sh`` do. What comes down is not held back.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass

from lola_flwr.errors import UserError

# A piece is what may go out at once: short against a round, long against a wake-up.
_PIECE_S = 0.02
# What a late wake-up lost is made up for, as long as it was no longer than this.
SLACK_S = 0.1
_SMALLEST_PIECE_BYTES = 1448
_LARGEST_PIECE_BYTES = 64 * 1024
# What waits in the relay is little: a SuperNode gives a request up 30 s after it has
# sent the last byte of it, even if that is still in here.
_BUFFER_BYTES = 64 * 1024
_TCP_NOTSENT_LOWAT = 25  # Linux; Python names it from 3.12 on
_CONNECT_S = 30.0
# Of SO_LINGER: what is closed is reset, and waits for nothing.
_AT_ONCE = struct.pack("ii", 1, 0)
# A SuperNode has a few connections at a time, and looks for messages at least every
# minute. Each takes two of the files that a process may have open, and one of the
# SuperLink's.
_MOST_CONNECTIONS = 64
_IDLE_S = 300.0

# An upload session of Flower's ends 180 s after its last complete chunk, and two chunks
# are on their way at a time. The server also looks for a chunk ever more rarely, the
# longer it takes, which blurs what it measures: so a chunk takes 10 s at most.
_CHUNK_S = 10.0
_CHUNKS_IN_FLIGHT = 2
_SMALLEST_SHARE = 0.05
_SMALLEST_CHUNK_BYTES = 16 * 1024
_LARGEST_CHUNK_BYTES = 5 * 1024 * 1024


def chunk_bytes(uplink_bps: float, *, smallest_share: float = _SMALLEST_SHARE) -> int:
    """Return how large Flower's chunks may be on a link, in bytes.

    For the SuperNode's environment: ``FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE``. A chunk gets
    through in 10 s even with the smallest share. Flower's own size, 5 MiB, would lose
    the message where a device sends less than 0.47 Mbit/s.

    Parameters
    ----------
    uplink_bps
        Rate of the link, bit/s.
    smallest_share
        Smallest share of it to expect.
    """
    in_time = uplink_bps * smallest_share * _CHUNK_S / 8 / _CHUNKS_IN_FLIGHT
    return int(min(max(in_time, _SMALLEST_CHUNK_BYTES), _LARGEST_CHUNK_BYTES))


@dataclass
class _Activity:
    """When something last passed a connection, either way; on the loop's clock."""

    last_s: float


@dataclass(frozen=True)
class Pace:
    """A rate, and from when on the next byte may go; without state of its own.

    Parameters
    ----------
    rate_bps
        Bits per second; None is without limit.
    free_at_s
        When the link is free again.
    """

    rate_bps: float | None = None
    free_at_s: float = 0.0

    def send(self, count: int, now_s: float) -> tuple[Pace, float]:
        """Take a piece on.

        Parameters
        ----------
        count
            Its bytes.
        now_s
            The time.

        Returns
        -------
        The pace afterwards, and how many seconds the piece has to wait. No more than
        ``SLACK_S`` of idle time is saved up: a pause allows no burst.
        """
        if self.rate_bps is None:
            return self, 0.0
        start_s = max(self.free_at_s, now_s - SLACK_S)
        end_s = start_s + 8 * count / self.rate_bps
        return Pace(self.rate_bps, end_s), max(end_s - now_s, 0.0)

    def piece_bytes(self) -> int:
        """Return how much to take on at once."""
        if self.rate_bps is None:
            return _LARGEST_PIECE_BYTES
        in_piece = int(self.rate_bps * _PIECE_S / 8)
        return min(max(in_piece, _SMALLEST_PIECE_BYTES), _LARGEST_PIECE_BYTES)


class PacedRelay:
    """Passes a SuperNode's connections on, upward at the pace that is set.

    Parameters
    ----------
    listen
        Address of the relay, ``"127.0.0.1:9095"``; port 0 takes a free one.
    superlink
        Address of the SuperLink.

    Raises
    ------
    UserError
        An address is none, or taken.
    """

    def __init__(self, listen: str, superlink: str) -> None:
        self._listen = _host_and_port(listen)
        self._superlink = _host_and_port(superlink)
        self._pace = Pace()
        self.sent_bytes = 0
        self.received_bytes = 0
        self._loop = asyncio.new_event_loop()
        self._connections: set[asyncio.Task[None]] = set()
        started: Future[int] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(started,), name="uplink-relay", daemon=True
        )
        self._thread.start()
        self.port = started.result()

    def hold_to(self, limit_bps: float | None, upload_bytes: int) -> str | None:
        """Let what goes up pass at this rate from now on."""
        self._loop.call_soon_threadsafe(self._set, Pace(limit_bps))
        return None if limit_bps is None else "pacing"

    def describe(self) -> str:
        """Return one line for a person."""
        rate = self._pace.rate_bps
        limit = "no limit now" if rate is None else f"{rate / 1e6:.3f} Mbit/s now"
        host, port = self._superlink
        return (
            f"relay at {self._listen[0]}:{self.port} to {host}:{port}, {limit}, "
            f"{self.sent_bytes} B up and {self.received_bytes} B down so far"
        )

    def counters(self) -> dict[str, int]:
        """Return the bytes that went up and came down, those of TLS included."""
        return {"sent_bytes": self.sent_bytes, "received_bytes": self.received_bytes}

    def close(self) -> None:
        """End all connections and the relay."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _set(self, pace: Pace) -> None:
        self._pace = pace

    def _run(self, started: Future[int]) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            listening = socket.create_server(self._listen)
            # Connections inherit it; set later, it would not shrink their window.
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
            server = self._loop.run_until_complete(
                asyncio.start_server(self._relay, sock=listening, limit=_BUFFER_BYTES)
            )
        except OSError as error:
            host, port = self._listen
            started.set_exception(
                UserError(
                    f"The relay cannot listen at {host}:{port} ({error.strerror}); "
                    "choose another port."
                )
            )
            return
        started.set_result(server.sockets[0].getsockname()[1])
        self._loop.run_forever()
        server.close()
        tasks = list(self._connections)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    async def _relay(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._connections) >= _MOST_CONNECTIONS:
            _reset(writer)
            return
        self._connections.add(task)
        streams = [writer]
        activity = _Activity(self._loop.time())
        try:
            # Who says nothing is not connected: a client speaks first, over TLS too.
            first = await asyncio.wait_for(
                reader.read(self._pace.piece_bytes()), _CONNECT_S
            )
            if not first:
                return
            up_reader, up_writer = await asyncio.wait_for(
                asyncio.open_connection(*self._superlink, limit=_BUFFER_BYTES),
                _CONNECT_S,
            )
            streams.append(up_writer)
            for stream in streams:
                _small_buffers(stream)
            await asyncio.gather(
                self._pump(reader, up_writer, activity, first, paced=True),
                self._pump(up_reader, writer, activity, paced=False),
            )
            for stream in streams:
                # What is still in its buffer goes out first.
                stream.close()
                await stream.wait_closed()
        # Either end may go at any time; Flower connects again.
        except (OSError, TimeoutError, asyncio.TimeoutError):  # noqa: UP041 - Python 3.10
            pass
        finally:
            self._connections.discard(task)
            for stream in streams:
                _reset(stream)

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        activity: _Activity,
        piece: bytes = b"",
        *,
        paced: bool,
    ) -> None:
        while piece or (piece := await self._read(reader, activity, paced=paced)):
            if paced:
                self._pace, wait_s = self._pace.send(len(piece), time.monotonic())
                await asyncio.sleep(wait_s)
                self.sent_bytes += len(piece)
            else:
                self.received_bytes += len(piece)
            writer.write(piece)
            await writer.drain()
            piece, activity.last_s = b"", self._loop.time()
        with suppress(OSError):
            writer.write_eof()

    async def _read(
        self, reader: asyncio.StreamReader, activity: _Activity, *, paced: bool
    ) -> bytes:
        """Read what comes next, as long as something passes either way."""
        size = self._pace.piece_bytes() if paced else _LARGEST_PIECE_BYTES
        reading = asyncio.ensure_future(reader.read(size))
        try:
            while not reading.done():
                left_s = activity.last_s + _IDLE_S - self._loop.time()
                if left_s <= 0.0:
                    raise TimeoutError
                await asyncio.wait({reading}, timeout=left_s)
            return reading.result()
        finally:
            reading.cancel()


def _small_buffers(writer: asyncio.StreamWriter) -> None:
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # Not the whole send buffer, which a long fast link needs.
    with suppress(OSError):
        connection.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, _BUFFER_BYTES)
    writer.transport.set_write_buffer_limits(high=_BUFFER_BYTES)


def _reset(writer: asyncio.StreamWriter) -> None:
    """End a connection as one that broke: TLS takes a mere end for an attack.

    Flower connects again after the first, and gives up after the second.
    """
    connection = writer.get_extra_info("socket")
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
    writer.transport.abort()


def _host_and_port(address: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdigit() and int(port) < 65536):
        raise UserError(f"{address!r} is no address; write host:port.")
    return host.strip("[]"), int(port)
