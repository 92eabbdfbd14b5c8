"""Checkpoint files: what a crash, a disk or an editor can do to them."""

from __future__ import annotations

import numpy as np
import pytest

from lola_flwr.errors import UserError
from lola_flwr.run.checkpoint import CheckpointDamaged, Checkpoints, Snapshot, read

SNAPSHOT = Snapshot(
    {
        "model/a.w": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "optimizer/0/step": np.array(7.0, np.float32),
        "empty": np.zeros((0, 3), np.int64),
    },
    {
        "server_round": 3,
        "wireless_s": 0.1 + 0.2,
        "odd": [["ü", 1], None, {"x": 1e-300}],
    },
)


def assert_same(one, other):
    assert one.values == other.values
    assert one.arrays.keys() == other.arrays.keys()
    for name, array in one.arrays.items():
        np.testing.assert_array_equal(array, other.arrays[name], strict=True)


def test_what_is_saved_is_read_and_the_last_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "new", keep=2)
    assert checkpoints.latest() == (None, [])
    for server_round in (1, 2, 10):
        values = {**SNAPSHOT.values, "server_round": server_round}
        checkpoints.save(server_round, Snapshot(SNAPSHOT.arrays, values))
    found, damaged = checkpoints.latest()
    assert_same(found, Snapshot(SNAPSHOT.arrays, values))
    assert damaged == []
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "round-000002.safetensors",
        "round-000010.safetensors",
    ]
    with pytest.raises(UserError, match="keep=0"):
        Checkpoints(tmp_path, keep=0)


def test_a_write_that_was_cut_off_at_any_byte_is_never_taken_for_a_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, SNAPSHOT)
    whole = checkpoints.save(2, SNAPSHOT).read_bytes()
    for length in range(len(whole)):
        # Killed while it wrote beside the place, before the rename.
        (tmp_path / "round-000003.safetensors.part").write_bytes(whole[:length])
        # A disk that lost the end of a file that was there.
        (tmp_path / "round-000002.safetensors").write_bytes(whole[:length])
        found, (line,) = checkpoints.latest()
        assert "round-000002" in line
        assert_same(found, SNAPSHOT)


def test_every_changed_byte_is_noticed(tmp_path, rng):
    path = Checkpoints(tmp_path).save(1, SNAPSHOT)
    whole = path.read_bytes()
    noticed = 0
    for position in range(len(whole)):
        changed = bytearray(whole)
        changed[position] ^= int(rng.integers(1, 256))
        path.write_bytes(changed)
        try:
            found = read(path)
        except CheckpointDamaged:
            noticed += 1
        else:
            # One kind of white space between the header's words for another.
            assert_same(found, SNAPSHOT)
    assert noticed > 0.98 * len(whole)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 100, b"\0" * 100])
def test_other_files_are_no_checkpoints(tmp_path, content):
    path = tmp_path / "round-000001.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointDamaged):
        read(path)


def test_arrays_that_changed_places_are_noticed(tmp_path):
    first, second = np.zeros(3, np.float32), np.ones(3, np.float32)
    path = Checkpoints(tmp_path).save(1, Snapshot({"a": first, "b": second}, {}))
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b'"a"', b'"c"'))
    with pytest.raises(CheckpointDamaged, match="checksum"):
        read(path)
