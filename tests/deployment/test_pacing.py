from __future__ import annotations

import socket
import threading
import time
from contextlib import ExitStack, suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lola_flwr.deployment import pacing
from lola_flwr.deployment.pacing import SLACK_S, Pace, PacedRelay, chunk_bytes
from lola_flwr.deployment.serve_worker import main, uplink_limit
from lola_flwr.deployment.uplink import NoLimit
from lola_flwr.errors import UserError


@given(
    rate_bps=st.floats(1e3, 1e9),
    pieces=st.lists(st.integers(1, 10**6), min_size=1, max_size=30),
    pauses=st.lists(st.floats(0, 10), min_size=30, max_size=30),
)
def test_no_stretch_of_time_carries_more_than_the_rate(rate_bps, pieces, pauses):
    pace, now = Pace(rate_bps), 100.0
    departures = []
    for piece, pause in zip(pieces, pauses, strict=False):
        pace, wait_s = pace.send(piece, now)
        assert wait_s >= 0
        departures.append((now + wait_s, piece))
        now += pause
    # A piece has passed when it departs: after the bits before it and its own.
    for first in range(len(departures)):
        for last in range(first + 1, len(departures)):
            bits = 8 * sum(piece for _, piece in departures[first + 1 : last + 1])
            took = departures[last][0] - departures[first][0]
            assert (took + SLACK_S) * rate_bps >= bits * (1 - 1e-9) - 1e-3


def test_late_wake_ups_do_not_lower_the_rate():
    pace, now = Pace(1e6), 0.0
    for _ in range(1000):
        pace, wait_s = pace.send(1250, now)  # 10 ms
        now += wait_s + 0.004
    assert now == pytest.approx(10, rel=0.02)


def test_without_a_rate_nothing_waits():
    assert Pace().send(10**9, 5.0) == (Pace(), 0.0)


def test_chunks_get_through_before_their_session_ends():
    for uplink_bps in (2e4, 1e5, 1e6, 1e7, 1e9):
        size = chunk_bytes(uplink_bps)
        assert 16 * 1024 <= size <= 5 * 1024 * 1024
    # Two in flight share the smallest share: 10 s of 10 Mbit/s x 0.05.
    assert chunk_bytes(1e7) == 312_500


@pytest.fixture
def server():
    """A server that reads all of a connection, answers its length, and closes."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve():
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    def answer(connection):
        with connection:
            count = 0
            while data := connection.recv(65536):
                count += len(data)
            connection.sendall(f"{count}".encode() + b"x" * 200_000)

    threading.Thread(target=serve, daemon=True).start()
    yield f"127.0.0.1:{listening.getsockname()[1]}"
    listening.close()


@pytest.fixture
def relay(server):
    made = PacedRelay("127.0.0.1:0", server)
    yield made
    made.close()


def upload(relay, count):
    with socket.create_connection(("127.0.0.1", relay.port)) as connection:
        connection.sendall(b"y" * count)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while data := connection.recv(65536):
            answer += data
    return answer


def test_everything_passes_both_ways(relay):
    answer = upload(relay, 300_000)
    assert answer == b"300000" + b"x" * 200_000
    assert relay.sent_bytes == 300_000
    assert relay.received_bytes == len(answer)
    assert "300000 B up" in relay.describe()


def test_uploads_share_one_rate_and_do_not_exceed_it(relay):
    assert relay.hold_to(4e6, 400_000) == "pacing"
    start = time.monotonic()
    threads = [threading.Thread(target=upload, args=(relay, 200_000)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # 400 kB at 4 Mbit/s; how much longer it takes is the machine's business.
    assert time.monotonic() - start >= 0.8 - SLACK_S
    assert relay.hold_to(None, 0) is None


def is_open(connection):
    """Tell whether the other end has not closed it."""
    connection.settimeout(0.3)
    try:
        return connection.recv(1) != b""
    except TimeoutError:
        return True
    except ConnectionResetError:
        return False


def test_there_are_so_many_connections_and_no_more(relay, monkeypatch):
    monkeypatch.setattr(pacing, "_MOST_CONNECTIONS", 2)
    with ExitStack() as stack:
        silent = [
            stack.enter_context(socket.create_connection(("127.0.0.1", relay.port)))
            for _ in range(3)
        ]
        assert sorted(map(is_open, silent)) == [False, True, True]
    assert upload(relay, 10).startswith(b"10")


def test_a_connection_that_nothing_passes_ends(monkeypatch):
    monkeypatch.setattr(pacing, "_IDLE_S", 1.5)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        relay = PacedRelay("127.0.0.1:0", address)
        try:
            with socket.create_connection(("127.0.0.1", relay.port)) as connection:
                connection.sendall(b"y")
                upstream, _ = listening.accept()
                with upstream:
                    assert upstream.recv(1) == b"y"
                    # As long as something passes one way, both stay.
                    for _ in range(4):
                        time.sleep(0.5)
                        upstream.sendall(b"z")
                        assert connection.recv(1) == b"z"
                    connection.settimeout(60)
                    with suppress(ConnectionResetError):
                        assert connection.recv(1) == b""
        finally:
            relay.close()


def test_a_superlink_that_is_not_there_resets_the_connection():
    """Over TLS Flower takes an end for an attack, and gives up."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    relay = PacedRelay("127.0.0.1:0", f"127.0.0.1:{port}")
    try:
        with socket.create_connection(("127.0.0.1", relay.port)) as connection:
            connection.settimeout(60)
            connection.sendall(b"y")
            with pytest.raises(ConnectionResetError):
                connection.recv(1)
    finally:
        relay.close()


def test_a_taken_port_is_named(relay, server):
    with pytest.raises(UserError, match=f"cannot listen at 127.0.0.1:{relay.port}"):
        PacedRelay(f"127.0.0.1:{relay.port}", server)


@pytest.mark.parametrize("address", ["nowhere", ":9", "host:port", "host:99999"])
def test_a_bad_address_is_named(address):
    with pytest.raises(UserError, match="write host:port"):
        PacedRelay(address, "127.0.0.1:1")


def test_a_workers_options_choose_one_limit():
    assert isinstance(uplink_limit(None, None, None), NoLimit)
    with pytest.raises(UserError, match="needs the SuperLink's address"):
        uplink_limit(None, "127.0.0.1:0", None)
    with pytest.raises(UserError, match="Choose one limit"):
        uplink_limit("127.0.0.1:1", "127.0.0.1:0", "eth0")


def test_asking_a_worker_that_is_not_there(tmp_path, capsys):
    assert main(["--socket", str(tmp_path / "none.sock"), "--status"]) == 1
    assert "No worker runs" in capsys.readouterr().err
