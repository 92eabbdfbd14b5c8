"""Compare a device's reply with a recorded one: the same bytes, but for rounding."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from lola_flwr.wire.passes import from_bf16
from lola_flwr.wire.records import REPORT_KEY

# Of the largest entry of a gradient, in the codec's own steps where it rounds.
_ROUNDING = {"float32": 1e-4, "uint16": 2**-7}


def assert_same_reply(found, recorded):
    """Compare messages byte for byte, once floats that are as near are the same."""
    assert found.metadata.__dict__ == recorded.metadata.__dict__ | {
        "_message_id": found.metadata.message_id
    }
    assert found.has_error() == recorded.has_error()
    if recorded.has_error():
        assert found.error.code == recorded.error.code
        assert found.error.reason
        return
    _take_floats(found.content, recorded.content)
    one, other = (
        {i: o.deflate() for i, o in get_all_nested_objects(m).items()}
        for m in (found, recorded)
    )
    assert one == other


def _take_floats(found, recorded):
    """Put recorded floats in the place of those that differ from them by rounding."""
    if "loss" in recorded.get(REPORT_KEY, {}):
        loss = recorded[REPORT_KEY]["loss"]
        assert found[REPORT_KEY]["loss"] == pytest.approx(loss, rel=1e-5)
        found[REPORT_KEY]["loss"] = loss
    for key, arrays in recorded.array_records.items():
        assert list(found[key]) == list(arrays)
        for name, array in arrays.items():
            _assert_near(found[key][name], array)
            found[key][name] = Array(array.dtype, array.shape, array.stype, array.data)


def _assert_near(found, recorded):
    assert (found.dtype, found.shape, found.stype) == (
        recorded.dtype,
        recorded.shape,
        recorded.stype,
    )
    one, other = found.numpy(), recorded.numpy()
    # The header, too, is the same to the byte.
    head = len(recorded.data) - other.nbytes
    assert found.data[:head] == recorded.data[:head]
    if recorded.dtype == "uint16":
        one, other = from_bf16(one), from_bf16(other)
    largest = np.abs(other).max()
    assert 0 < largest < np.inf
    assert np.abs(one - other).max() <= _ROUNDING[recorded.dtype] * largest
