from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lola_flwr.errors import UserError
from lola_flwr.wire.codec import codec_named
from lola_flwr.wire.packing import VALUES, pack, packed_type, received_values, unpack

SHAPES = st.dictionaries(
    st.text("ab.", min_size=1, max_size=4),
    st.lists(st.integers(1, 5), max_size=3).map(tuple),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16", "int8", "topk:0.3"])
@given(shapes=SHAPES, seed=st.integers(0, 99))
def test_what_was_packed_comes_out_again(name, shapes, seed):
    codec = codec_named(name)
    rng = np.random.default_rng(seed)
    wire = {
        n: codec.encode(rng.standard_normal(shape).astype(np.float32))
        for n, shape in shapes.items()
    }
    packed = pack(wire)
    assert (packed.shape, packed.dtype) == packed_type(codec, shapes.values())
    assert packed.nbytes == sum(array.nbytes for array in wire.values())
    for n, array in unpack(packed, codec, shapes).items():
        np.testing.assert_array_equal(array, wire[n])
        decoded = codec.decode(array, shapes[n])
        np.testing.assert_array_equal(decoded, codec.decode(wire[n], shapes[n]))


@given(shapes=SHAPES, seed=st.integers(0, 99))
def test_values_are_received_packed_or_by_name(shapes, seed):
    rng = np.random.default_rng(seed)
    values = {n: rng.random(shape, dtype=np.float32) for n, shape in shapes.items()}
    packed = {VALUES: pack(values)}
    for received in (packed, values):
        own = received_values(received, shapes)
        assert list(own) == list(shapes)
        for name, array in own.items():
            np.testing.assert_array_equal(array, values[name])
    assert received_values({}, {}) == {}
    for wrong in (packed[VALUES][1:], packed[VALUES].astype("f8")):
        with pytest.raises(UserError, match="Use the same model"):
            received_values({VALUES: wrong}, shapes)


def test_the_order_of_a_model_s_parameters_does_not_matter(rng):
    codec = codec_named("fp32")
    arrays = {n: rng.random((3, 3), dtype=np.float32) for n in ("q.w", "k.w", "v.w")}
    packed = pack(arrays)
    shapes = {name: arrays[name].shape for name in ("v.w", "q.w", "k.w")}
    assert packed.size == sum(map(math.prod, shapes.values()))
    for name, array in unpack(packed, codec, shapes).items():
        np.testing.assert_array_equal(array, arrays[name])
