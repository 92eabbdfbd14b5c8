from __future__ import annotations

from io import BytesIO

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lola_flwr.errors import UserError
from lola_flwr.wire.codec import (
    CODECS,
    TopK,
    codec_ladder,
    codec_named,
    encode_with_feedback,
    relative_error,
)
from lola_flwr.wire.npy import MalformedArray, read_npy

NAMES = (*CODECS, "topk:0.01", "topk:0.3", "topk:1")


def floats(limit=60000):
    return hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0)
        | st.sampled_from([(70, 3), (3, 70), (130, 64), (700,)]),
        elements=st.floats(-limit, limit, width=32),
    )


def npy(array) -> bytes:
    stream = BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def round_trip(codec, values):
    """What the server reads out of what a device sends."""
    wire = codec.encode(values)
    shape, dtype = wire_type = codec.wire_type(values.shape)
    assert wire.nbytes == wire_type.nbytes
    decoded = codec.decode(read_npy(npy(wire), shape=shape, dtype=dtype), values.shape)
    assert decoded.dtype == np.float32
    assert decoded.shape == values.shape
    return decoded


@given(floats(), st.sampled_from(["fp32", "bf16"]))
def test_round_trip_is_within_the_type_s_rounding(values, name):
    decoded = round_trip(CODECS[name], values)
    relative = {"fp32": 0.0, "bf16": 2.0**-8}[name]
    # Below the smallest normal number a type rounds to an absolute step.
    absolute = {"fp32": 0.0, "bf16": 2.0**-133}[name]
    assert np.all(np.abs(decoded - values) <= relative * np.abs(values) + absolute)


@given(floats(limit=2.0**127), st.integers(-140, 0))
def test_fp16_keeps_its_bits_whatever_the_scale(values, exponent):
    values = np.ldexp(values, exponent).astype(np.float32)
    error = np.abs(round_trip(CODECS["fp16"], values) - values)
    magnitude = np.abs(values)
    largest = magnitude.max(initial=0.0)
    # In float64, whose own rounding does not matter here.
    relative = np.where(magnitude >= 2.0**-28 * np.float64(largest), 2.0**-11, 0.0)
    bound = np.maximum(
        relative * magnitude, max(2.0**-39 * np.float64(largest), 2.0**-150)
    )
    assert np.all(error <= bound)


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 2e-8, 1e-3, 1.0, 65520.0, 1e38])
def test_fp16_loses_no_gradient_however_small_or_large(scale):
    values = np.float32(scale) * np.float32([[1.0, -0.5, 2.0**-10], [0.0, 1.5, 1.0]])
    decoded = round_trip(CODECS["fp16"], values)
    np.testing.assert_allclose(decoded, values, rtol=2**-11, atol=2.0**-149)
    assert np.count_nonzero(decoded) == np.count_nonzero(values)


def test_fp16_does_not_overflow_right_below_a_power_of_two():
    for exponent in range(-148, 128):
        below = np.nextafter(np.float32(2.0**exponent), np.float32(0))
        values = np.array([below, -below], np.float32)
        decoded = round_trip(CODECS["fp16"], values)
        assert np.all(np.abs(decoded - values) <= 2.0**-11 * below), exponent


def test_what_overflows_in_fp16_does_so_in_silence():
    wire = np.array([113, 65504, -65504], np.float16)
    np.testing.assert_array_equal(CODECS["fp16"].decode(wire, (2,)), [np.inf, -np.inf])
    wire = CODECS["fp16"].encode(np.float32([np.inf, 3e38]))
    assert np.isinf(CODECS["fp16"].decode(wire, (2,))).any()


@pytest.mark.parametrize("exponent", [np.nan, np.inf, 0.5, -127, 114, -2048])
def test_powers_of_two_that_no_encoder_sends(exponent):
    wire = CODECS["fp16"].encode(np.ones((2, 3), np.float32))
    wire[0] = exponent
    with pytest.raises(MalformedArray, match="a whole number from -126 to 113"):
        CODECS["fp16"].decode(wire, (2, 3))


@given(floats(limit=2.0**100))
def test_int8_is_within_half_a_level_of_its_channel(values):
    error = np.abs(round_trip(CODECS["int8"], values) - values)
    if values.ndim > 1 and values.size:
        length = values.size // len(values)
        axes = tuple(range(1, values.ndim))
        if length < min(64, len(values)):
            axes = (0,)  # a row's scale would cost too much: one for each column
        largest = np.abs(values).max(axis=axes, keepdims=True)
    else:
        largest = np.abs(values).max(initial=0.0)
    # Below 127 of the smallest float32 steps a scale is zero.
    assert np.all(error <= largest / 254 * (1 + 1e-4) + 127 * 2.0**-149)


def test_int8_of_numbers_below_the_normal_ones():
    smallest = np.float32(2.0**-149)
    # 190 / 127 of the smallest number is rounded to 1 of it: 190 is beyond 127 levels.
    decoded = round_trip(CODECS["int8"], smallest * np.float32([190, -190, 3]))
    np.testing.assert_array_equal(decoded, smallest * np.float32([127, -127, 3]))
    # 60 / 127 of it is no scale at all.
    assert not CODECS["int8"].encode(smallest * np.float32([60, -60])).any()
    assert not CODECS["int8"].encode(np.zeros((2, 3), np.float32)).any()


@given(floats(limit=2.0**100))
def test_int4_is_within_half_a_level_of_its_group(values):
    error = np.abs(round_trip(CODECS["int4"], values) - values).ravel()
    for first in range(0, error.size, 64):
        largest = np.float64(np.abs(values.ravel()[first : first + 64]).max())
        # Half of a scale; beyond 7 of a scale that was rounded down, by that.
        bound = largest * (1 / 14 + 2.0**-8) + 7 * 2.0**-133
        assert np.all(error[first : first + 64] <= bound)


def test_int4_of_what_is_too_small_for_a_scale_is_nothing():
    smallest = np.float32(2.0**-133)  # of bfloat16
    wire = CODECS["int4"].encode(smallest * np.float32([3, -3]))
    assert not CODECS["int4"].decode(wire, (2,)).any()


@given(floats(limit=2.0**60))
def test_int2_leaves_less_out_of_each_row_than_there_was(values):
    """So error feedback, whatever the gradients, does not grow without bound."""
    if values.ndim < 2:
        values = values.reshape(1, -1)
    values[np.abs(values) < 1e-15] = 0  # whose squares may be nothing
    error = (round_trip(CODECS["int2"], values) - values).astype(np.float64)
    columns = values.size // max(len(values), 1) < min(64, len(values))
    axes = 0 if columns else tuple(range(1, values.ndim))
    square = np.square(values, dtype=np.float64)
    left, was = np.square(error).sum(axis=axes), square.sum(axis=axes)
    assert np.all(left <= was * (1 + 2.0**-14))


@pytest.mark.parametrize("shape", [(64, 64), (300, 70), (129, 513), (500, 1000)])
def test_int2_follows_rows_and_columns(shape):
    """However much they differ, the error is nearly that of normal values."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal(shape)
    values *= np.exp2(rng.uniform(-3, 3, (shape[0], 1)))
    values *= np.exp2(rng.uniform(-3, 3, shape[1]))
    values = values.astype(np.float32)
    error = np.square(round_trip(CODECS["int2"], values) - values).sum()
    assert relative_error("int2") == pytest.approx(0.1175, abs=0.01)  # Max, 1960
    assert error / np.square(values).sum() < 1.2 * relative_error("int2")


def test_what_int2_sends_bit_by_bit():
    rows = np.float32([[1, -1, 3, -3, 1, 3], [-6, 6, 2, -2, -2, 6]])
    wire = CODECS["int2"].encode(rows)
    # Scales 1 and 2 in bfloat16; then 2 1 3 0 2 3 and 0 3 2 1 1 3, the first lowest.
    assert wire.tobytes() == bytes([0x80, 0x3F, 0x00, 0x40, 0x36, 0xCE, 0xD6])
    np.testing.assert_array_equal(CODECS["int2"].decode(wire, rows.shape), rows)
    # One dimension has no product of rows and columns.
    of_int8 = CODECS["int8"].encode(rows[0])
    assert CODECS["int2"].encode(rows[0]).tobytes() == of_int8.tobytes()


@given(floats(), st.floats(0.01, 1))
def test_top_k_keeps_the_largest_and_rounds_them(values, fraction):
    decoded = round_trip(TopK(fraction), values)
    kept = int(np.ceil(fraction * values.size)) if values.size else 0
    assert np.count_nonzero(decoded) <= kept
    left_out = np.abs(values[decoded == 0])
    smallest_kept = np.abs(decoded[decoded != 0]).min(initial=np.inf)
    assert np.all(left_out <= smallest_kept * (1 + 2.0**-8) + 2.0**-133)
    there = decoded != 0
    rounding = 2.0**-8 * np.abs(values[there])
    assert np.all(np.abs(decoded[there] - values[there]) <= rounding + 2.0**-133)


@pytest.mark.parametrize(
    ("name", "shape", "nbytes"),
    [
        ("fp32", (768, 768), 4 * 768**2),
        ("bf16", (768, 768), 2 * 768**2),
        ("fp16", (768, 768), 2 * 768**2 + 2),
        ("int8", (3072, 768), 3072 * 768 + 4 * 3072),
        ("int8", (768, 8), 768 * 8 + 4 * 8),
        ("int8", (8, 768), 768 * 8 + 4 * 8),
        ("int8", (768,), 768 + 4),
        ("int4", (3072, 768), 3072 * 768 // 2 + 3072 * 768 // 64 * 2),
        ("int4", (65,), 33 + 2 * 2),
        ("int4", (), 1 + 2),
        ("int2", (3072, 768), 3072 * 768 // 4 + 2 * (3072 + 768)),
        ("int2", (768, 8), 768 * 8 // 4 + 2 * 8),
        ("int2", (8, 768), 768 * 8 // 4 + 2 * 8),
        ("int2", (3, 3), 3 + 2 * 3),
        ("int2", (768,), 768 + 4),
        ("topk:0.01", (3072, 768), 23593 * 6),
        ("topk:0.01", (256, 256), 656 * 4),
        ("topk:0.01", (768,), 8 * 4),
        # Up to which position a byte is enough.
        ("topk:0.01", (256,), 3 * 3),
        ("topk:0.01", (257,), 3 * 4),
    ],
)
def test_sizes_are_known_beforehand(name, shape, nbytes):
    assert codec_named(name).wire_type(shape).nbytes == nbytes


@given(st.data(), st.sampled_from(NAMES))
def test_nothing_is_lost_with_error_feedback(data, name):
    codec = codec_named(name)
    gradients = data.draw(
        hnp.arrays(np.float32, (5, 12, 7), elements=st.floats(-100, 100, width=32))
    )
    sent, residual = np.zeros((12, 7), np.float32), None
    for gradient in gradients:
        wire, residual = encode_with_feedback(codec, gradient, residual)
        sent += codec.decode(wire, gradient.shape)
    if not codec.has_feedback:
        assert residual is None
        return
    np.testing.assert_allclose(
        sent + residual, gradients.sum(axis=0), rtol=0, atol=1e-3
    )


def test_top_k_sends_everything_in_the_end():
    """Error feedback: a small but constant gradient gets through after some rounds."""
    codec, residual = codec_named("topk:0.1"), None
    gradient = np.ones(100, np.float32)
    gradient[:10] = 5
    sent = np.zeros(100, np.float32)
    for _ in range(40):
        wire, residual = encode_with_feedback(codec, gradient, residual)
        sent += codec.decode(wire, (100,))
    np.testing.assert_allclose(sent / 40, gradient, atol=0.5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_arrives_as_such_and_leaves_nothing(name, bad):
    gradient = np.ones((3, 4), np.float32)
    gradient[1, 2] = bad
    codec = codec_named(name)
    wire, residual = encode_with_feedback(codec, gradient, np.ones_like(gradient))
    assert residual is None
    assert not np.isfinite(codec.decode(wire, gradient.shape)).all()


@given(
    st.data(),
    st.sampled_from(["fp16", "int8", "int4", "int2", "topk:0.3"]),
    st.sampled_from([(3, 5), (9,)]),
)
def test_any_bytes_of_the_right_size_are_values_or_the_one_error(data, name, shape):
    codec = codec_named(name)
    wire_type = codec.wire_type(shape)
    nbytes = wire_type.nbytes
    wire = np.frombuffer(
        data.draw(st.binary(min_size=nbytes, max_size=nbytes)), wire_type.dtype
    )
    try:
        decoded = codec.decode(wire, shape)
    except MalformedArray:
        return
    assert decoded.shape == shape
    assert decoded.dtype == np.float32


@pytest.mark.parametrize("positions", [[5, 4, 6], [1, 1, 2], [0, 1, 9]])
def test_positions_that_no_encoder_sends(positions):
    codec = TopK(0.3)
    wire = np.zeros(codec.wire_type((9,)).nbytes, np.uint8)
    wire[:3] = positions
    with pytest.raises(MalformedArray, match="must rise, and be below 9"):
        codec.decode(wire, (9,))


@pytest.mark.parametrize("dropped", [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
def test_bf16_rounds_as_torch_does(dropped):
    # Every value of bfloat16, and how far it is to the next: a half is a tie.
    bits = (np.arange(2**16, dtype=np.uint32) << 16) | np.uint32(dropped)
    values = bits.view(np.float32)
    wire = CODECS["bf16"].encode(values)
    expected = torch.from_numpy(values.copy()).to(torch.bfloat16)
    nan = np.isnan(values)
    np.testing.assert_array_equal(
        wire[~nan], expected.view(torch.uint16).numpy()[~nan], strict=True
    )
    assert np.isnan(CODECS["bf16"].decode(wire, values.shape)[nan]).all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("zip", "codec='zip' is unknown; choose from fp32"),
        ("topk", "codec='topk': write the share of the values"),
        ("topk:0", "codec='topk:0': write the share"),
        ("topk:nan", "codec='topk:nan': write the share"),
        ("topk:1.01", "codec='topk:1.01': write the share"),
        ("topk:-0.5", "codec='topk:-0.5': write the share"),
        ("auto:1", "codec='auto:1' is unknown"),
    ],
)
def test_unknown_codecs(name, message):
    with pytest.raises(UserError, match=message):
        codec_ladder(name)


def test_auto_is_a_ladder_of_codecs_from_coarse_to_fine():
    sizes = [codec_named(n).wire_type((64, 64)).nbytes for n in codec_ladder("auto")]
    assert sizes == sorted(sizes)


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


def test_headers_that_numpy_would_write_otherwise_are_read_too():
    values = np.arange(6, dtype="f4").reshape(2, 3)
    header = b"{'shape':(2,3),'descr':'<f4','fortran_order':False}"
    header += b" " * (64 - 10 - 1 - len(header)) + b"\n"
    data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    for each in (npy(values), data + values.tobytes()):
        array = read_npy(each, shape=(2, 3), dtype=np.dtype("f4"))
        np.testing.assert_array_equal(array, values)
        assert not array.flags.writeable


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


class TestBits:
    """What travels, bit by bit, against the formulas on whole arrays."""

    @staticmethod
    def bf16(values):
        bits = values.ravel().view(np.uint32).astype(np.uint64)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(values.ravel()), 0x7FC0, rounded).astype(np.uint16)

    @staticmethod
    def topk(values, kept):
        flat = values.ravel()
        first = flat.size - kept
        at = np.sort(np.argpartition(np.abs(flat), first)[first:])
        at = at.astype(np.min_scalar_type(max(flat.size - 1, 0)))
        return at.view(np.uint8).tobytes() + TestBits.bf16(flat[at]).tobytes()

    @staticmethod
    def int8(rows):
        scale = np.abs(rows).max(axis=1, initial=0) / np.float32(127)
        levels = np.rint(rows / np.where(scale > 0, scale, 1)[:, None])
        return scale.tobytes() + np.clip(levels, -127, 127).astype(np.int8).tobytes()

    @staticmethod
    def int4(values):
        groups = np.pad(values.ravel(), (0, -values.size % 64)).reshape(-1, 64)
        largest = np.abs(groups).max(axis=1, initial=0)
        bits = TestBits.bf16(largest / np.float32(7))
        scale = (bits.astype(np.uint32) << 16).view(np.float32)
        levels = np.rint(groups / np.where(scale > 0, scale, 1)[:, None])
        plus_8 = (np.clip(levels, -7, 7) + 8).astype(np.uint8).ravel()[: values.size]
        pairs = np.pad(plus_8, (0, -values.size % 2)).reshape(-1, 2)
        return bits.tobytes() + (pairs[:, 0] + 16 * pairs[:, 1]).tobytes()

    def values(self, shape, kind):
        rng = np.random.default_rng(5)
        values = rng.standard_normal(shape).astype(np.float32)
        flat = values.reshape(-1)
        if kind == "ties":
            flat[:] = np.round(flat)
        elif kind == "denormals":
            flat *= np.float32(1e-41)
        elif kind == "sorted":
            flat.sort()
        elif kind == "few":
            flat[rng.random(flat.size) < 0.999] = 0
        elif kind == "not finite" and flat.size:
            bits = np.uint32([0x7F800000, 0xFF800000, 0x7FC00000, 0xFF812345])
            flat[rng.integers(flat.size, size=4)] = bits.view(np.float32)
        return values

    KINDS = ("normal", "ties", "denormals", "sorted", "few", "not finite")

    @pytest.mark.parametrize("shape", [(0,), (1,), (257, 2), (3, 25_001), (131_073,)])
    @pytest.mark.parametrize("kind", KINDS)
    def test_are_those_of_the_formulas(self, shape, kind):
        values = self.values(shape, kind)
        wire = CODECS["bf16"].encode(values)
        np.testing.assert_array_equal(wire.ravel(), self.bf16(values))
        for fraction in (0.001, 0.3):
            codec = TopK(fraction)
            kept = codec.wire_type(shape).nbytes // (
                np.min_scalar_type(max(values.size - 1, 0)).itemsize + 2
            )
            assert codec.encode(values).tobytes() == self.topk(values, kept)
        with np.errstate(invalid="ignore"):
            rows = values.T if shape == (257, 2) else np.atleast_2d(values)
            if kind != "not finite":
                assert CODECS["int8"].encode(values).tobytes() == self.int8(rows)
                assert CODECS["int4"].encode(values).tobytes() == self.int4(values)
                return
            # What is no number has no level, but its channel's scale says so.
            scale = CODECS["int8"].encode(values)[: 4 * len(rows)].view(np.float32)
            np.testing.assert_array_equal(
                scale, np.abs(rows).max(axis=1, initial=0) / np.float32(127)
            )

    def test_every_rounding_of_bf16(self):
        upper = np.arange(1 << 16, dtype=np.uint32)[:, np.newaxis] << 16
        lower = np.uint32([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
        values = (upper | lower).view(np.float32)
        wire = CODECS["bf16"].encode(values)
        np.testing.assert_array_equal(wire.ravel(), self.bf16(values))
