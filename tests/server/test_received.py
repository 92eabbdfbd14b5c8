"""Single arrays of a device's reply."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest

from lola_flwr.server.received import (
    UpdateRefused,
    decoded,
    finite,
    read_array,
    read_move,
)
from lola_flwr.wire.codec import codec_named

FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)


def npy(array) -> bytes:
    stream = BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def test_an_array_is_of_one_of_the_types():
    for dtype in (FLOAT32, FLOAT64):
        values = np.arange(6, dtype=dtype).reshape(2, 3)
        found = read_array("w", npy(values), (2, 3), FLOAT64, FLOAT32)
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize(
    "data", [npy(np.ones((3, 2), np.float32)), npy(np.ones((2, 3), "i4")), b"none"]
)
def test_another_array_is_refused_by_its_name(data):
    with pytest.raises(UpdateRefused, match=r"^wrong-array: w: .") as raised:
        read_array("w", data, (2, 3), FLOAT64, FLOAT32)
    assert raised.value.reason == "wrong-array"
    assert "None" not in str(raised.value)
    # What is said is of the first type.
    with pytest.raises(UpdateRefused) as alone:
        read_array("w", data, (2, 3), FLOAT64)
    assert str(alone.value) == str(raised.value)


@pytest.mark.parametrize(("dtype", "start"), [(FLOAT32, 1.0), (FLOAT64, 1e8)])
def test_a_move_is_what_was_sent_less_what_was_trained(dtype, start):
    # In float32, 1e8 and a quarter are 1e8: the difference is of the wider type.
    sent = start + np.arange(6, dtype=dtype).reshape(2, 3)
    move = read_move("w", npy(sent - dtype.type(0.25)), sent, None)
    assert move.dtype == np.float32
    np.testing.assert_array_equal(move, np.full((2, 3), 0.25))


def test_a_model_of_halves_may_come_back_in_float32():
    sent = np.ones(3, np.float16)
    trained = np.float32([1.0001, 1.0, 0.5])
    move = read_move("w", npy(trained), sent, None)
    np.testing.assert_array_equal(move, np.float32(1) - trained)
    move = read_move("w", npy(trained.astype(np.float16)), sent, None)
    np.testing.assert_array_equal(move, np.float32([0, 0, 0.5]))
    # Their difference need not be a half.
    move = read_move("w", npy(np.float16([0.5])), np.float16([2047]), None)
    np.testing.assert_array_equal(move, np.float32([2046.5]))


def test_a_move_in_a_codec_is_decoded():
    codec = codec_named("fp16")
    move = np.float32([[0.5, -0.25, 3.0], [0.0, 1.0, 2.0]])
    found = read_move("w", npy(codec.encode(move)), np.ones((2, 3), "f4"), codec)
    np.testing.assert_array_equal(found, move)
    assert found.shape == (2, 3)
    for data in (npy(move), b"none"):
        for asked in (codec, None):
            with pytest.raises(UpdateRefused, match=r"^wrong-array: w: "):
                read_move("w", data, np.ones((3, 2), "f4"), asked)
    topk, damaged = codec_named("topk:0.5"), np.full(6, 255, np.uint8)
    with pytest.raises(UpdateRefused, match=r"^wrong-array: w: "):
        read_move("w", npy(damaged), np.ones(4, "f4"), topk)


def test_what_a_codec_cannot_read_is_refused():
    codec = codec_named("topk:0.5")
    wire = codec.encode(np.float32([4.0, 3.0, 2.0, 1.0]))
    assert decoded("w", wire, (4,), codec).tolist() == [4.0, 3.0, 0.0, 0.0]
    damaged = np.full_like(wire, 255)
    with pytest.raises(UpdateRefused, match=r"^wrong-array: w: ."):
        decoded("w", damaged, (4,), codec)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused(value):
    values = np.float32([0.0, value])
    with pytest.raises(UpdateRefused, match=r"^non-finite: w holds NaN or infinity$"):
        finite("w", values)
    assert finite("w", values[:1]).tolist() == [0.0]
