from __future__ import annotations

import os
import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays, scalar_dtypes

from lola_flwr.deployment import worker_link
from lola_flwr.deployment.worker_link import (
    VERSION,
    Frame,
    LinkError,
    Silent,
    admits,
    at_it,
    connect,
    receive_answer,
    receive_frame,
    send_frame,
    token_path,
    write_token,
)
from lola_flwr.errors import UserError


@pytest.fixture
def pair():
    left, right = socket.socketpair()
    with left, right:
        yield left, right


@settings(max_examples=50, deadline=None)
@given(
    values=st.dictionaries(
        st.text(max_size=8),
        arrays(
            scalar_dtypes().filter(lambda dtype: dtype.kind in "fiub"),
            array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
        ),
        max_size=4,
    )
)
def test_a_frame_arrives_as_it_was_sent(values):
    left, right = socket.socketpair()
    with left, right:
        header = {"a": [1, "x", None], "b": {"c": b"\x00\xff", "d": b""}}
        send_frame(left, Frame("update", header, values))
        received = receive_frame(right)
    assert (received.kind, received.header) == ("update", header)
    assert list(received.arrays) == list(values)
    for name, array in values.items():
        assert received.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(received.arrays[name], array)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=64))
def test_anything_else_is_refused(data):
    left, right = socket.socketpair()
    with left, right:
        left.sendall(data)
        left.shutdown(socket.SHUT_WR)
        with pytest.raises(LinkError):
            receive_frame(right)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=64) | st.sampled_from([b"[]", b'{"kind":1}', b"{}"]))
def test_a_header_that_is_none_is_refused(header):
    left, right = socket.socketpair()
    with left, right:
        left.sendall(struct.pack("!4sHI", b"LOLA", VERSION, len(header)) + header)
        left.shutdown(socket.SHUT_WR)
        with pytest.raises(LinkError):
            receive_frame(right)


@pytest.mark.parametrize(
    "listed",
    ['["x","|O",[1]]', '["x","<f4",[-1]]', '["x","<f8",[99999999,9999999]]'],
)
def test_arrays_that_may_not_be_are_refused_before_memory_is_taken(pair, listed):
    header = f'{{"kind":"update","header":{{}},"arrays":[{listed}]}}'.encode()
    pair[0].sendall(struct.pack("!4sHI", b"LOLA", VERSION, len(header)) + header)
    with pytest.raises(LinkError, match="Array"):
        receive_frame(pair[1])


def test_another_version_is_refused(pair):
    pair[0].sendall(struct.pack("!4sHI", b"LOLA", VERSION + 1, 2) + b"{}")
    with pytest.raises(LinkError, match="restart the worker"):
        receive_frame(pair[1])


def test_who_is_at_it_may_take_longer_than_who_hangs(pair, monkeypatch):
    monkeypatch.setattr(worker_link, "_BEAT_S", 0.05)

    def answer():
        with at_it(pair[0]):
            time.sleep(2.0)
        send_frame(pair[0], Frame("update", {"a": 1}))

    with ThreadPoolExecutor() as pool:
        answered = pool.submit(answer)
        assert receive_answer(pair[1], hangs_s=1.5).header == {"a": 1}
        answered.result()
    with pytest.raises(Silent, match=r"says nothing for 0\.1 s"):
        receive_answer(pair[1], hangs_s=0.1)


def test_only_the_token_admits(pair):
    for shown, admitted in (("secret", True), ("secreT", False), (7, False)):
        send_frame(pair[0], Frame("hello", {"token": shown}))
        assert admits(pair[1], "secret") == admitted


def test_a_hello_is_short(pair):
    send_frame(pair[0], Frame("hello", {"token": "x" * 2000}))
    with pytest.raises(LinkError):
        admits(pair[1], "secret")


def test_a_token_that_others_can_read_is_not_shown(tmp_path):
    path = tmp_path / "worker.sock"
    write_token(path, "secret")
    path.touch()
    assert token_path(path).stat().st_mode & 0o777 == 0o600
    token_path(path).chmod(0o640)
    with pytest.raises(UserError, match="640"):
        connect(path)


def test_a_token_is_never_seen_in_part(tmp_path):
    path = tmp_path / "worker.sock"
    write_token(path, "secret")
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(lambda: [write_token(path, "secret") for _ in range(300)])
        while not writing.done():
            assert token_path(path).read_text() == "secret"
        writing.result()


def test_no_worker_is_a_link_error(tmp_path):
    with pytest.raises(LinkError, match="No worker runs"):
        connect(tmp_path / "worker.sock")
    write_token(tmp_path / "worker.sock", "secret")
    with pytest.raises(LinkError, match="No worker runs"):
        connect(tmp_path / "worker.sock")


def test_a_busy_worker_is_waited_for(tmp_path):
    path = tmp_path / "worker.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.bind(str(path))
        listening.listen(0)
        write_token(path, "token")
        with ThreadPoolExecutor() as pool:
            with connect(path):  # fills the queue
                with pytest.raises(LinkError, match=r"busy for 0\.1 s"):
                    connect(path, timeout_s=0.1)
                waiting = pool.submit(connect, path)
                first, _ = listening.accept()
            with first, waiting.result(timeout=60):
                second, _ = listening.accept()
                with second:
                    assert admits(second, "token")


@pytest.mark.parametrize("theirs", ["socket", "token"])
def test_another_users_worker_is_not_talked_to(tmp_path, theirs):
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    path = tmp_path / "worker.sock"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        write_token(path, "x")
        os.chown(path if theirs == "socket" else token_path(path), 65534, -1)
        with pytest.raises(UserError, match="another user's"):
            connect(path)
