from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from lola_flwr.device.store import LostCopy, complete
from lola_flwr.model.blocks import partition_parameters
from lola_flwr.wire.held_versions import HeldVersions
from lola_flwr.wire.versions import (
    MalformedManifest,
    Manifest,
    Piece,
    Versions,
    digest,
    model_pieces,
)

NAMES = ("embed.w", "layer.0.a", "layer.0.b", "layer.1.a", "layer.1.b", "head.w", "pos")
PIECES = ((1, 2), (3, 4), (5, 6), (0,))
VERSIONS = Versions(PIECES)


def test_pieces_are_blocks_head_and_the_rest():
    partition = partition_parameters(NAMES)
    assert model_pieces(partition, NAMES) == PIECES
    # Devices that hold the frozen arrays are sent the trainable ones alone.
    assert model_pieces(partition, partition.trainable) == ((0, 1), (2, 3), (4, 5))


def test_a_digest_knows_type_and_shape():
    values = np.arange(6, dtype="f4")
    different = [
        [values],
        [values.view("i4")],
        [values.reshape(2, 3)],
        [values[:3], values[3:]],
        [values[::-1]],
        [],
    ]
    assert len({digest(arrays) for arrays in different}) == len(different)
    assert digest([values[::2]]) == digest([values[::2].copy()]), "content alone"
    assert digest([np.float32(3)]) == digest([np.array(3, "f4")])


manifests = st.lists(
    st.tuples(st.integers(0, 15), st.booleans()), min_size=1, max_size=9
).map(
    lambda owners: Manifest(
        tuple(
            Piece(
                digest=f"{owner:032x}",
                positions=tuple(i for i, (o, _) in enumerate(owners) if o == owner),
                sent=owner % 2 == 0,
            )
            for owner in dict.fromkeys(o for o, _ in owners)
        )
    )
)


@given(manifests)
def test_a_manifest_survives_the_wire(manifest):
    assert Manifest.from_text(manifest.to_text()) == manifest


DIGEST = "0123456789abcdef" * 2


@pytest.mark.parametrize(
    "text",
    [
        "",
        "abc:0-1",
        f"{DIGEST.upper()}:0-1",
        f"../../{DIGEST}:0-1",
        f"{DIGEST}:1-2",
        f"{DIGEST}:0-1 {DIGEST}:1-2",
        f"{DIGEST}:2-2,0-1",
        f"{DIGEST}:3-0",
        f"{DIGEST}:0-9999999",
        f"{DIGEST}:0-1,",
        f"{DIGEST}:0-1\n",
        f"{DIGEST}:0-1  {DIGEST}:2-2",
    ],
)
def test_texts_that_are_no_manifest(text):
    with pytest.raises(MalformedManifest):
        Manifest.from_text(text)


@given(st.text(alphabet="+:-, 0123456789abcdef", max_size=80))
def test_any_text_is_a_manifest_or_the_one_error(text):
    try:
        manifest = Manifest.from_text(text)
    except MalformedManifest:
        return
    assert manifest.num_arrays >= 0


def model(seed):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((2, 3), dtype=np.float32) for _ in NAMES]


def sent(manifest, arrays):
    return [arrays[i] for i in manifest.sent_positions]


def test_arrays_that_are_not_those_announced(tmp_path):
    arrays = model(0)
    manifest = HeldVersions().manifest("a", VERSIONS.of(arrays))
    changed = [values.copy() for values in arrays]
    changed[3][0, 0] += 1
    with pytest.raises(MalformedManifest, match="do not have the digest"):
        complete(changed, manifest, tmp_path)
    with pytest.raises(MalformedManifest, match="6 arrays received; the manifest says"):
        complete(arrays[1:], manifest, tmp_path)


def test_a_damaged_copy_is_never_used(tmp_path):
    arrays = model(0)
    first = HeldVersions().manifest("a", VERSIONS.of(arrays))
    complete(arrays, first, tmp_path)
    held = HeldVersions().acknowledged("a", first, first.version)
    second = held.manifest("a", VERSIONS.of(arrays))
    assert second.sent_positions == ()
    victim = tmp_path / f"piece-000-{second.pieces[0].digest}.safetensors"
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(bytes(content))
    with pytest.raises(LostCopy, match="1 of 4 pieces"):
        complete([], second, tmp_path)


def test_a_device_without_a_store_is_sent_everything_and_completes_it():
    held = HeldVersions()
    for seed in range(3):
        arrays = model(seed)
        manifest = held.manifest("a", VERSIONS.of(arrays))
        assert manifest.sent_positions == tuple(range(7))
        np.testing.assert_array_equal(complete(arrays, manifest, None), arrays)
        held = held.acknowledged("a", manifest, None)


class DownlinkMachine(RuleBasedStateMachine):
    """Server and devices against an oracle that sends everything each time.

    Blocks change, messages and replies are lost, devices lose their disk, share one, or
    start anew on the server's side: what a device trains on is always the model.
    """

    DEVICES = ("a", "b", "c")

    def __init__(self):
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        # Two devices share a disk, as in a simulation.
        self.directory = {d: self.root / ("c" if d == "c" else "ab") for d in "abc"}
        self.held = HeldVersions()
        self.arrays = model(0)
        self.counter = 0
        # What each device surely has: the oracle for what need not be sent.
        self.told = dict.fromkeys(self.DEVICES, frozenset())

    def teardown(self):
        shutil.rmtree(self.root)

    @rule(piece=st.integers(0, 3), back=st.booleans())
    def change(self, piece, back):
        self.counter += 1
        # Sometimes a piece gets a content that it had before.
        seed = self.counter % 3 if back else self.counter
        for position in PIECES[piece]:
            self.arrays[position] = model(seed)[position]

    @rule(
        device=st.sampled_from(DEVICES),
        fate=st.sampled_from(["done", "done", "message lost", "reply lost"]),
    )
    def send(self, device, fate):
        manifest = self.held.manifest(device, VERSIONS.of(self.arrays))
        digests = {digest(self.arrays[i] for i in piece): piece for piece in PIECES}
        expected = [
            i
            for d, piece in digests.items()
            if d not in self.told[device]
            for i in piece
        ]
        assert manifest.sent_positions == tuple(sorted(expected))
        if fate == "message lost":
            return
        try:
            whole = complete(
                sent(manifest, self.arrays),
                Manifest.from_text(manifest.to_text()),
                self.directory[device],
            )
        except LostCopy:
            if fate == "done":
                self.held = self.held.without(device)
                self.told[device] = frozenset()
            return
        np.testing.assert_array_equal(whole, self.arrays)
        if fate == "done":
            self.held = self.held.acknowledged(device, manifest, manifest.version)
            self.told[device] = frozenset(digests)

    @rule(device=st.sampled_from(DEVICES))
    def lose_disk(self, device):
        shutil.rmtree(self.directory[device], ignore_errors=True)

    @rule(device=st.sampled_from(DEVICES))
    def leave(self, device):
        self.held = self.held.of_these(d for d in self.DEVICES if d != device)
        self.told[device] = frozenset()

    @invariant()
    def disks_are_bounded(self):
        for directory in self.directory.values():
            # At most this version and as many bytes of others: 2 x 4 pieces.
            assert len(list(directory.glob("*"))) <= 10


TestDownlink = DownlinkMachine.TestCase
TestDownlink.settings = settings(max_examples=40, stateful_step_count=30)
