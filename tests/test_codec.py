from __future__ import annotations

from io import BytesIO

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lola_flwr.codec import CODECS, MalformedArray, codec_named, read_npy

FINITE = hnp.arrays(
    np.float32,
    hnp.array_shapes(max_dims=3),
    elements=st.floats(-60000, 60000, width=32),
)


def npy(array) -> bytes:
    stream = BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


@given(FINITE, st.sampled_from(sorted(CODECS)))
def test_round_trip_is_within_the_type_s_rounding(values, name):
    codec = CODECS[name]
    wire = codec.encode(values)
    assert wire.dtype == codec.wire_dtype
    assert wire.shape == values.shape
    decoded = codec.decode(read_npy(npy(wire), shape=values.shape, dtype=wire.dtype))
    assert decoded.dtype == np.float32
    relative = {"fp32": 0.0, "bf16": 2.0**-8, "fp16": 2.0**-11}[name]
    # Below the smallest normal number a type rounds to an absolute step.
    absolute = {"fp32": 0.0, "bf16": 2.0**-133, "fp16": 2.0**-24}[name]
    assert np.all(np.abs(decoded - values) <= relative * np.abs(values) + absolute)


@given(FINITE)
def test_bf16_rounds_as_torch_does(values):
    wire = CODECS["bf16"].encode(values)
    expected = torch.from_numpy(values.copy()).to(torch.bfloat16)
    np.testing.assert_array_equal(wire, expected.view(torch.uint16).numpy())


def test_fp16_saturates():
    decoded = CODECS["fp16"].decode(CODECS["fp16"].encode(np.float32([1e30, -1e30])))
    np.testing.assert_array_equal(decoded, np.float32([65504, -65504]))


def test_unknown_codec():
    with pytest.raises(ValueError, match="codec='zip' is unknown; choose from fp32"):
        codec_named("zip")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "Not an array"),
        (npy(np.zeros((2, 3), "f4"))[:-1], "body of 23 B; expected 24 B"),
        (npy(np.zeros((2, 3), "f4")) + b"x", "153 B received; expected at most 152 B"),
        (npy(np.zeros((3, 2), "f4")), r"shape \(3, 2\) .* expected \(2, 3\)"),
        (npy(np.zeros((2, 3), "f2")), "type float16"),
        (npy(np.zeros((2, 3), ">f4")), "type >f4"),
        (npy(np.asfortranarray(np.zeros((2, 3), "f4"))), "Column-major"),
    ],
)
def test_arrays_that_were_not_asked_for(data, message):
    with pytest.raises(MalformedArray, match=message):
        read_npy(data, shape=(2, 3), dtype=np.dtype("f4"))


def test_pickled_objects_are_never_loaded():
    stream = BytesIO()
    np.save(stream, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(MalformedArray):
        read_npy(stream.getvalue(), shape=(1,), dtype=np.dtype("f4"))


VALID = npy(np.arange(6, dtype="f4").reshape(2, 3))


@given(
    st.binary(max_size=200)
    | st.builds(
        lambda position, value: (
            VALID[:position] + bytes([value]) + VALID[position + 1 :]
        ),
        st.integers(0, len(VALID) - 1),
        st.integers(0, 255),
    )
)
def test_any_bytes_give_the_array_or_the_one_error(data):
    try:
        array = read_npy(data, shape=(2, 3), dtype=np.dtype("f4"))
    except MalformedArray:
        return
    assert array.shape == (2, 3)
    assert array.dtype == np.float32
