from __future__ import annotations

import os
import time

import numpy as np
import pytest
from safetensors.numpy import save

from lola_flwr.device.store import PieceStore, Residuals, run_store
from lola_flwr.wire.versions import digest

KINDS = [
    np.float32([[1, 2], [3, 4]]),
    np.array(5),  # num_batches_tracked of a batch normalization
    np.array([True, False]),
    np.zeros((0, 3), np.float16),
]


def test_what_was_written_is_read_and_nothing_else(tmp_path):
    store = PieceStore(tmp_path / "new")
    content = digest(KINDS)
    assert store.read(0, content) is None
    store.write(0, content, KINDS)
    for read, written in zip(store.read(0, content), KINDS, strict=True):
        assert read.dtype == written.dtype
        np.testing.assert_array_equal(read, written)
    assert store.read(0, "0" * 32) is None


def test_many_arrays_keep_their_order(tmp_path):
    arrays = [np.float32([i]) for i in range(120)]
    store = PieceStore(tmp_path)
    store.write(0, digest(arrays), arrays)
    np.testing.assert_array_equal(store.read(0, digest(arrays)), arrays)


@pytest.mark.parametrize("damage", [b"", b"x" * 100, save({"0": KINDS[0]})])
def test_a_damaged_file_is_as_none_and_written_anew(tmp_path, damage):
    store, content = PieceStore(tmp_path), digest(KINDS)
    store.write(0, content, KINDS)
    (tmp_path / f"piece-000-{content}.safetensors").write_bytes(damage)
    assert store.read(0, content) is None
    store.write(0, content, KINDS)
    assert store.read(0, content) is not None


def test_names_from_the_network_stay_inside_the_directory(tmp_path):
    with pytest.raises(ValueError, match="is no digest"):
        PieceStore(tmp_path).read(0, "../secret")


def test_what_nobody_can_be_sent_the_change_of_goes(tmp_path):
    """Of each place what it holds and the two latest before stay, used or not."""
    store = PieceStore(tmp_path)
    pieces = [[np.full(1000, age, np.float32)] for age in range(5)]
    contents = [digest(arrays) for arrays in pieces]
    for age, arrays in enumerate(pieces):
        for place in (0, 1):
            store.write(place, contents[age], arrays)
            path = tmp_path / f"piece-{place:03d}-{contents[age]}.safetensors"
            os.utime(path, (age, age))
    # The second place was trained last three rounds ago, and read since.
    assert store.read(1, contents[0]) is not None
    store.keep_only([contents[4], contents[1]])
    held = [
        [age for age in range(5) if store.read(place, contents[age]) is not None]
        for place in (0, 1)
    ]
    assert held == [[2, 3, 4], [1, 3, 4]]


def test_another_run_s_directory_goes_when_a_day_old(tmp_path):
    for run, age_s in (("1", 2 * 86_400), ("2", 60), ("photos", 2 * 86_400)):
        (tmp_path / run).mkdir()
        then = time.time() - age_s
        os.utime(tmp_path / run, (then, then))
    assert run_store(3, tmp_path) == tmp_path / "3"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3", "photos"]


def test_residuals_are_a_device_s_and_a_part_s_own(tmp_path):
    here, other = (Residuals(tmp_path, name) for name in ("../phone 1", "phone 10"))
    here.put("block-1", 3, {"w": np.float32([1, 2])})
    assert here.take("block-10", 4) == other.take("block-1", 4) == {}
    np.testing.assert_array_equal(here.take("block-1", 4)["w"], [1, 2])
    assert here.take("block-1", 4) == {}, "it was added once"


@pytest.mark.parametrize(
    ("server_round", "valid"), [(3, False), (4, True), (13, True), (14, False)]
)
def test_a_residual_is_valid_for_ten_rounds(tmp_path, server_round, valid):
    residuals = Residuals(tmp_path, "phone")
    residuals.put("head", 3, {"w": np.float32([1])})
    assert bool(residuals.take("head", server_round)) == valid


def test_old_residuals_of_other_parts_are_removed(tmp_path):
    residuals = Residuals(tmp_path, "phone", max_rounds=2)
    for server_round in range(1, 20):
        part = f"block-{server_round}"
        residuals.take(part, server_round)
        residuals.put(part, server_round, {"w": np.float32([1])})
    assert len(list(tmp_path.iterdir())) == 3


def test_nothing_left_out_leaves_no_file(tmp_path):
    Residuals(tmp_path, "phone").put("head", 1, {})
    assert not list(tmp_path.iterdir())
