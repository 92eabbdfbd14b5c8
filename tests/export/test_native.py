"""The native runner: built from its sources, with programs of a small model."""

from __future__ import annotations

import json
import shutil
import socket
import struct
import subprocess
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest

from lola_flwr.deployment.worker_link import (
    Frame,
    LinkError,
    receive_frame,
    send_frame,
)
from lola_flwr.errors import UserError
from lola_flwr.export.manifest import MANIFEST_FILE
from lola_flwr.export.runner import NativeRunner
from lola_flwr.model.backprop import block_gradient
from simulations.benchmarks import native_runner
from tests.export.programs import (
    assert_same,
    built_runner,
    drawn,
    programs,
    values_of,
)

pytestmark = pytest.mark.slow
pytest.importorskip("executorch", reason="needs the extra [export]")


@pytest.fixture(scope="module")
def native():
    return built_runner()


def inputs_of(of, manifest):
    batch = drawn(manifest)
    arrays = [batch[spec.name].numpy() for spec in manifest.batch]
    return batch, [*values_of(of), *arrays]


@pytest.mark.parametrize("kind", ["bert", "llama-lora"])
def test_gradients_are_those_of_block_gradient(native, kind):
    of, directory, manifest = programs(kind)
    batch, given = inputs_of(of, manifest)
    with NativeRunner(native, directory, manifest) as runner:
        for block in (2, 0, 1, 0):
            expected = block_gradient(of.model, of.partition, block, batch)
            assert_same(runner.run(block, given), expected)
        # Its own, though this process, which started it, has ten times as much.
        assert 1e6 < runner.peak_memory_bytes < 60e6


def test_what_it_needs_is_small(native):
    own, system = native_runner.installed_bytes(native)
    assert 1e6 < own < own + system < 60e6
    shared = subprocess.run(["ldd", native], capture_output=True, text=True).stdout
    assert "libtorch" not in shared and "libpython" not in shared
    assert "not found" not in shared


def checked(native, directory):
    """Let the runner check a directory; return its exit code and its words."""
    done = subprocess.run(
        [native, directory, "--check"], capture_output=True, text=True
    )
    return done.returncode, done.stdout or done.stderr


def test_damaged_exports_are_refused_before_anything_runs(native, tmp_path):
    of, directory, manifest = programs("bert")
    _, given = inputs_of(of, manifest)
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    assert checked(native, copy)[0] == 0
    whole = (copy / "block-1.pte").read_bytes()
    text = (copy / MANIFEST_FILE).read_text()
    later, elsewhere = (json.loads(text) for _ in range(2))
    later["version"] += 1
    elsewhere["frozen"]["name"] = "../copy/frozen.ptd"
    for name, content, said in [
        (
            "block-1.pte",
            whole[:99] + b"?" + whole[100:],
            "not the file that was export",
        ),
        ("block-1.pte", whole[:-1], "not the file that was exported"),
        (MANIFEST_FILE, json.dumps(later).encode(), "of version 2, and this program"),
        (MANIFEST_FILE, json.dumps(elsewhere).encode(), "no name of a file beside"),
        (MANIFEST_FILE, b"{", "no JSON"),
        (MANIFEST_FILE, b"[]", "no manifest of lola-flwr export"),
        (MANIFEST_FILE, text.replace('"sha256"', '"sha1"').encode(), "is damaged"),
    ]:
        before = (copy / name).read_bytes()
        (copy / name).write_bytes(content)
        code, words = checked(native, copy)
        assert code == 1 and said in words and words.count("\n") == 1, words
        with (
            NativeRunner(native, copy, manifest) as runner,
            pytest.raises(UserError, match=said),
        ):
            runner.run(1, given)
        (copy / name).write_bytes(before)


class Talk:
    """A conversation with a runner, frame by frame."""

    def __init__(self, native, directory):
        self.ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [native, directory], stdin=theirs, stdout=theirs, stderr=subprocess.PIPE
            )
        self.ready = receive_frame(self.ours)

    def ask(self, frame):
        send_frame(self.ours, frame)
        return receive_frame(self.ours)

    def close(self):
        self.ours.close()
        said = self.process.stderr.read().decode()
        return self.process.wait(10), said


def test_it_refuses_what_it_was_not_asked_for_and_goes_on(native):
    of, directory, manifest = programs("bert")
    batch, given = inputs_of(of, manifest)
    arrays = dict(zip((s.name for s in manifest.inputs), given, strict=True))
    first = next(iter(arrays))
    talk = Talk(native, directory)
    assert talk.ready.kind == "ready"
    assert talk.ready.header["base_fingerprint"] == manifest.base_fingerprint
    for frame, said in [
        (Frame("walk", {}, arrays), "does not know the message 'walk'"),
        (Frame("run", {"block": 9}, arrays), "No program trains block 9"),
        (Frame("run", {"block": "1"}, arrays), "No program trains block"),
        (Frame("run", {}, arrays), "No program trains block null"),
        (Frame("run", {"block": 1}), "not the inputs"),
        (Frame("run", {"block": 1}, {**arrays, first: arrays[first][:-1]}), "not the"),
        (
            Frame("run", {"block": 1}, {**arrays, first: arrays[first].astype("<f8")}),
            "not the inputs",
        ),
    ]:
        answer = talk.ask(frame)
        assert answer.kind == "error" and said in answer.header["message"]
    answer = talk.ask(Frame("run", {"block": 1}, arrays))
    expected = block_gradient(of.model, of.partition, 1, batch)
    assert_same([*answer.arrays.values()], expected)
    assert [*answer.arrays] == ["loss", *expected.gradients]
    assert talk.close()[0] == 0


@pytest.mark.parametrize(
    "sent",
    [
        b"HTTP/1.1 GET /",
        struct.pack("!4sHI", b"LOLA", 2, 10) + b"{}",
        struct.pack("!4sHI", b"LOLA", 3, 2**32 - 1),
        struct.pack("!4sHI", b"LOLA", 3, 2) + b"{}",
        struct.pack("!4sHI", b"LOLA", 3, 100) + b"{",
    ],
)
def test_what_is_no_frame_ends_it(native, sent):
    talk = Talk(native, programs("bert")[1])
    talk.ours.sendall(sent)
    talk.ours.shutdown(socket.SHUT_WR)
    with pytest.raises(LinkError):
        receive_frame(talk.ours)
    code, said = talk.close()
    assert code == 1 and said.splitlines()[-1].startswith("error: ")


def test_a_runner_that_died_is_said_and_started_anew(native):
    of, directory, manifest = programs("bert")
    _, given = inputs_of(of, manifest)
    with closing(NativeRunner(native, directory, manifest)) as runner:
        first = runner.run(2, given)
        runner._process.kill()
        with pytest.raises(UserError, match="ended in the middle of a step"):
            runner.run(2, given)
        for one, other in zip(first, runner.run(2, given), strict=True):
            np.testing.assert_array_equal(one, other)
    with pytest.raises(UserError, match="cannot be started"):
        NativeRunner(native.with_name("none"), directory, manifest).run(2, given)
    with pytest.raises(UserError, match="No program trains block 2"):
        NativeRunner(native, directory, replace(manifest, programs=())).run(2, given)
