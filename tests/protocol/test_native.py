"""The native device answers the recorded messages, with the same bytes."""

from __future__ import annotations

import base64
import json
import shutil
import signal
import subprocess
import threading
import time

import numpy as np
import pytest
import torch
from flwr.common.constant import ErrorCode
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.proto.message_pb2 import PullObjectResponse
from flwr.supercore.inflatable.inflatable_object import get_object_id
from flwr.supercore.primitives.asymmetric import bytes_to_public_key
from flwr.superlink.routers.fleet.node_auth import verify_signature

from lola_flwr.export.data import ArrayFiles
from lola_flwr.model.backprop import block_gradient
from lola_flwr.wire.packing import VALUES, pack
from lola_flwr.wire.records import OUT_OF_MEMORY, REPORT_KEY
from tests.deployment.node.links import free_port
from tests.export.programs import programs
from tests.protocol import recorded
from tests.protocol.compare import assert_same_reply
from tests.protocol.conversation import (
    answered,
    names,
    read,
)
from tests.protocol.device_files import WAIT_S, command, device_files, running
from tests.protocol.replay import Replay, serving

# An export of a model, and perhaps the build, are within the first tests.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
pytest.importorskip("executorch", reason="needs the extra [export]")

# Not what other devices say.
TALKS = [name for name in names() if name not in ("join", "profile")]


@pytest.fixture(scope="module")
def of():
    return recorded.what_is_exported()


def spoken(exchanges, *options, **how):
    """Let a device join and answer; return the replay, and what the device said."""
    replay = Replay(exchanges)
    with serving(replay) as address, running(address, *options, **how) as process:
        assert replay.pushed.wait(WAIT_S), process.poll()
    assert process.returncode == 0, process.said
    return replay, process.said


def reply_in(replay):
    """Return what the device sent back, at the time of the recorded reply."""
    sent = answered([e for e in replay.heard if "/push-" in e.path])
    for part, content in sent.contents.items():
        assert get_object_id(content) == part
    metadata = sent.message.metadata
    assert metadata.ttl == pytest.approx(
        recorded.CREATED + 43_200 - metadata.created_at, abs=1e-3
    )
    found = sent.inflated()
    for each in (found, sent.message):
        each.metadata.__dict__["_message_id"] = metadata.message_id
        each.metadata.__dict__["_created_at"] = recorded.ANSWERED
        each.metadata.__dict__["_ttl"] = recorded.CREATED + 43_200 - recorded.ANSWERED
    return found


def without_measurements(reply):
    """Put what the recorded device pretended in place of what was measured."""
    if not reply.has_error() and "loss" in reply.content.get(REPORT_KEY, {}):
        report = reply.content[REPORT_KEY]
        assert report["compute-clock"] == "measured"
        assert 0 < report["compute-s"] < WAIT_S
        assert 1e6 < report.pop("peak-memory-bytes") < 80e6
        report["compute-clock"], report["compute-s"] = "simulated", 1.5
    return reply


@pytest.mark.parametrize("name", TALKS)
def test_it_answers_with_the_recorded_bytes(name):
    exchanges = read(name)
    replay, _ = spoken(exchanges)
    expected = answered(exchanges).inflated()
    assert_same_reply(without_measurements(reply_in(replay)), expected)
    # Objects are pushed once, and what is not needed is not pulled.
    pushed = [e.request for e in replay.heard if e.path.endswith("push-object")]
    assert len(pushed) == len(set(pushed))


def test_it_joins_signed_and_leaves():
    replay, said = spoken(read("profile-programs"))
    order = [e.path.rpartition("/")[2] for e in replay.heard]
    steps = [e.path.rpartition("/")[2] for e in read("join")]
    # The heartbeat is another thread's.
    steps.remove("send-node-heartbeat")
    assert [step for step in dict.fromkeys(order) if step in steps] == steps
    assert "Node 4711 is there." in said and "The device has left." in said
    first = replay.headers[0]
    headers = {name.lower(): value for name, value in first.items()}
    key, signature = (
        base64.b64decode(headers[f"flwr-{name}"], validate=True)
        for name in ("public-key", "signature")
    )
    timestamp = headers["flwr-timestamp"]
    assert verify_signature(bytes_to_public_key(key), timestamp.encode(), signature)
    activated = ActivateNodeRequest.FromString(replay.heard[1].request)
    assert (activated.public_key, activated.heartbeat_interval) == (key, 30)


def test_refusals_name_what_to_do():
    for name, said in [
        ("refused-model", "differ from the server's"),
        ("refused-codec", "codec='int4' is not among those of this device, fp32"),
        ("refused-method", "zeroth-order"),
        ("evaluate", "does not answer 'evaluate'"),
    ]:
        replay, words = spoken(read(name))
        error = reply_in(replay).error
        assert error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
        assert said in error.reason and "\n" not in error.reason
        assert error.reason in words


class Hostile(Replay):
    """A server whose answers are altered: ``alter(path, answer)``."""

    def __init__(self, exchanges, alter):
        super().__init__(exchanges)
        self._alter = alter
        self.altered = threading.Event()

    def answer(self, path, body):
        found = super().answer(path, body)
        name = path.rpartition("/")[2]
        other = self._alter(name, found)
        if other is not None:
            self.altered.set()
        return found if other is None else other


def with_object(change):
    """Alter what a pulled object holds, its id included where ``change`` says so."""

    def alter(name, found):
        if name != "pull-object":
            return None
        content = change(found.object_content)
        if content is None:
            return None
        return PullObjectResponse(
            object_found=True, object_available=True, object_content=content
        )

    return alter


def is_chunk(content):
    return content.startswith(b"ArrayChunk")


@pytest.mark.parametrize(
    ("alter", "said"),
    [
        # What is not the object that was asked for is not even read.
        (with_object(lambda c: c[:-1] + b"?" if is_chunk(c) else None), "not what its"),
        (with_object(lambda c: c + b"x"), "is not what its name says"),
        (with_object(lambda c: b"" if is_chunk(c) else None), "not what its name says"),
    ],
)
def test_what_a_server_sends_is_not_trusted(alter, said):
    replay = Hostile(read("train-fp32"), alter)
    with serving(replay) as address, running(address) as process:
        assert replay.pushed.wait(WAIT_S)
    assert process.returncode == 0 and said in process.said
    assert reply_in(replay).error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION


@pytest.mark.parametrize(
    ("alter", "said"),
    [
        (lambda n, _: b"\xff\xff\xff" if n == "pull-messages" else None, "is none of"),
        (
            lambda n, _: b"\0" * (17 << 20) if n == "pull-messages" else None,
            "answers with more than 16777216 bytes",
        ),
        (
            lambda n, _: PullObjectResponse() if n == "pull-object" else None,
            "does not have object",
        ),
        (lambda n, _: (403, b"over") if n == "pull-object" else None, "is over"),
        (lambda n, _: (401, b"who?") if n == "pull-messages" else None, "joining anew"),
        (lambda n, _: (503, b"soon") if n == "pull-messages" else None, "trying again"),
        (lambda n, _: (500, b"oh") if n == "register-node" else None, "joining anew"),
    ],
)
def test_answers_that_are_none_leave_it_alive_or_end_it_in_one_line(alter, said):
    replay = Hostile(read("train-fp32"), alter)
    with serving(replay) as address, running(address) as process:
        assert replay.altered.wait(WAIT_S)
        time.sleep(0.5)
    assert process.returncode in (0, 1)
    assert said in process.said


def test_a_server_that_comes_later_is_joined():
    replay = Replay(read("profile-programs"))
    port = free_port()
    with running(f"127.0.0.1:{port}") as process:
        time.sleep(0.5)
        with serving(replay, port):
            assert replay.pushed.wait(WAIT_S)
            process.send_signal(signal.SIGTERM)
            assert process.wait(WAIT_S) == 0
    assert "does not answer" in process.said


def refused(*options, **how):
    """Start a device that refuses; return its exit code and its words."""
    words = list(map(str, command("127.0.0.1:1", *options, **how)))
    done = subprocess.run(words, capture_output=True, text=True, timeout=WAIT_S)
    return done.returncode, done.stderr


def test_wrong_files_are_refused_before_anything_is_asked(tmp_path):
    whole = device_files()
    files = {
        "short": {"labels": np.zeros(3, np.int64)},
        "wide": {"input_ids": np.zeros((9, 11), np.int64)},
        "kind": {"labels": np.zeros(9, np.int32)},
        "order": {"input_ids": np.asfortranarray(np.zeros((9, 10), np.int64))},
    }
    for name, changed in files.items():
        shutil.copytree(whole / "data", tmp_path / name)
        for file, array in changed.items():
            np.save(tmp_path / name / f"{file}.npy", array)
    shutil.copytree(whole / "data", tmp_path / "cut")
    cut = tmp_path / "cut" / "labels.npy"
    cut.write_bytes(cut.read_bytes()[:-1])
    for name, said in [
        ("none", "cannot be read; write one array for each argument"),
        ("short", "3 examples, and another file 9"),
        ("wide", "input_ids.npy is <i8(9, 11), and the programs take <i8(6, 10)"),
        ("kind", "labels.npy is <i4(9,), and the programs take <i8(6,)"),
        ("order", "no array in .npy format 1.0"),
        ("cut", "labels.npy is no whole array"),
    ]:
        code, words = refused(data=tmp_path / name)
        assert (code, words.count("\n")) == (1, 1) and said in words, words
    (tmp_path / "key").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\n")
    for options, said in [
        (["--profile", whole / "steps" / "manifest.json"], "is no profile of version"),
        (["--auth-supernode-private-key", tmp_path / "key"], "OpenSSH's own format"),
        (["--root-certificates", tmp_path / "none"], "cannot be read; name the root"),
    ]:
        code, words = refused(*options, insecure=False)
        assert (code, words.count("\n")) == (1, 1) and said in words, words
    for options, said in [
        (["--seed", "-1"], "--seed -1 must be a whole number"),
        (["--mean-over", "all"], "must be examples, tokens or next-tokens"),
        (["--speed", "1"], "'--speed' is not known"),
        (["--auth-supernode-private-key", "key"], "need TLS"),
    ]:
        code, words = refused(*options)
        assert code == 2 and said in words and "usage:" in words


def test_too_few_examples_for_whole_batches_are_refused_at_once(tmp_path):
    whole = device_files()
    shutil.copytree(whole / "steps", tmp_path / "steps")
    path = tmp_path / "steps" / "manifest.json"
    manifest = json.loads(path.read_text()) | {"takes_fewer_examples": False}
    path.write_text(json.dumps(manifest))
    (tmp_path / "data").mkdir()
    for name, array in recorded.examples().items():
        np.save(tmp_path / "data" / f"{name}.npy", array[:5])
    code, words = refused(steps=tmp_path / "steps", data=tmp_path / "data")
    assert (code, words.count("\n")) == (1, 1) and "give whole batches" in words, words
    # Where a batch may be filled up, they are enough.
    replay, _ = spoken(read("profile-programs"), data=tmp_path / "data")
    said = reply_in(replay).content["lola-profile"]
    assert (said["num-examples"], said["batch-size"]) == (5, 6)


def asked_of(question):
    """Return a conversation in which a device is asked something else."""
    recorded.slice_small(question)
    reply = recorded.reply_of(None, question)  # which is an error
    return recorded.conversation(question, reply)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch_size": 7}, "batches of 7 examples, and the programs take 6"),
        ({"batch_size": 0}, "batches of 0 examples"),
        ({"block_index": 3}, "No program trains block 3"),
        ({"block_index": -1}, "block-index must be of type int"),
        ({"server_round": 2**40}, "server-round must be of type int"),
        ({"sends_head": 1}, "sends-head must be of type bool"),
        ({"further_blocks": "2"}, "train several blocks together"),
        ({"update_names": "a"}, "return weights"),
        ({"projection_rank": 2}, "project its gradient"),
        ({"components": "0 2"}, "send some components"),
        ({"manifest": "+" + "0" * 32 + ":0-9999999"}, "impossible positions"),
        ({"manifest": "+" + "0" * 32 + ":0-1,1-2"}, "a position twice"),
        ({"manifest": "+" + "0" * 32 + ":0-1"}, "is of 2 arrays; this model has"),
        ({"manifest": "x"}, "describes no pieces"),
        ({"codec": "in\nt4\x1b[0m"}, "codec='in t4 [0m' is not among"),
        ({"manifest": "+" + "0" * 32}, "impossible positions"),
    ],
)
def test_assignments_that_it_does_not_do_are_refused(of, options, said):
    replay, words = spoken(asked_of(recorded.training(of, **options)))
    assert said in reply_in(replay).error.reason, words


def test_a_piece_of_another_digest_is_refused(of):
    whole, _ = recorded.versions(of)
    digit = "1" if whole[1] != "1" else "2"
    changed = f"+{digit}{whole[2:]}"
    replay, _ = spoken(asked_of(recorded.training(of, manifest=changed)))
    assert "do not have the digest" in reply_in(replay).error.reason


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a: {VALUES: a[:-1]}, "Use the same model on server and device"),
        (lambda a: {VALUES: a.astype("<f8")}, "An array of <f8"),
        (lambda a: {VALUES: a.astype(">f4")}, "no array in .npy format"),
        (lambda a: {VALUES: a.reshape(1, -1)}, "Use the same model"),
        (lambda a: {"other": a}, "takes them in one array"),
        (lambda a: {VALUES: a, "other": a}, "takes them in one array"),
        (lambda a: {}, "takes them in one array"),
    ],
)
def test_values_of_another_model_are_refused(of, change, said):
    packed = pack(recorded.values_of(of))
    replay, _ = spoken(asked_of(recorded.training(of, arrays=change(packed))))
    assert said in reply_in(replay).error.reason


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d | {"arraychunk_ids": [99]}, "a chunk that it does not have"),
        (lambda d: d | {"arraychunk_ids": [-1]}, "a chunk that it does not have"),
        (lambda d: d | {"arraychunk_ids": [0] * 9}, "More bytes were received"),
        (lambda d: d | {"arraychunk_ids": [0]}, "ended too early"),
        (lambda d: d | {"arraychunk_ids": 0}, "no array of numpy's"),
        (lambda d: d | {"stype": "pickle"}, "no array of numpy's"),
    ],
)
def test_arrays_that_contradict_themselves_are_refused(of, change, said):
    """Their ids are right: the server itself is wrong."""
    question = recorded.training(of)
    recorded.slice_small(question)
    record = question.content["arrays"]
    (array,) = record.values()
    content = array.deflate()
    head, _, body = content.partition(b"\0")
    body = json.dumps(change(json.loads(body))).encode()
    kind, children, _ = head.split(b" ")
    content = b"%s %s %d\0%s" % (kind, children, len(body), body)
    array.deflate = lambda: content
    array.__dict__["_object_id"] = get_object_id(content)
    array.is_dirty, record.is_dirty = False, True
    question.metadata.__dict__["_message_id"] = question.object_id
    reply = recorded.reply_of(None, question)
    replay, _ = spoken(recorded.conversation(question, reply))
    assert said in reply_in(replay).error.reason


def test_a_language_model_with_adapters_weighs_by_its_tokens(tmp_path):
    of, steps, _ = programs("llama-lora")
    rng = np.random.default_rng(2)
    ids = rng.integers(5, 60, (8, 9))  # a column less than the programs have
    mask, labels = np.ones_like(ids), ids.copy()
    labels[::2, :4], labels[1, 6:], mask[1, 6:] = -100, -100, 0
    arrays = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    question = recorded.training(of, block_index=0, batch_size=5)
    where = {"steps": steps, "data": tmp_path}
    replay, _ = spoken(asked_of(question), "--mean-over", "next-tokens", **where)
    reply = reply_in(replay)
    drawn = ArrayFiles(arrays=arrays, seed=recorded.SEED)(1, 5)
    weight = int((drawn["labels"][:, 1:] != -100).sum())
    assert reply.content["metrics"]["num-examples"] == weight
    expected = block_gradient(
        *(of.model, of.partition, 0),
        {name: torch.from_numpy(array) for name, array in drawn.items()},
        loss_function=of.loss_function,
    )
    assert reply.content[REPORT_KEY]["loss"] == pytest.approx(expected.loss, rel=1e-5)
    gradient = pack({n: g.numpy() for n, g in expected.gradients.items()})
    found = reply.content["arrays"]["gradients"].numpy()
    assert np.abs(found - gradient).max() <= 1e-4 * np.abs(gradient).max() > 0
    # Of what the loss is a mean over it does not guess.
    code, said = refused(**where)
    assert code == 1 and "say what the loss is a mean over" in said


def test_too_little_memory_is_said_as_other_devices_say_it(of, tmp_path):
    shutil.copytree(device_files() / "steps", tmp_path / "steps")
    path = tmp_path / "steps" / "manifest.json"
    manifest = json.loads(path.read_text())
    for program in manifest["programs"]:
        program["arena_bytes"] = 10**15
    path.write_text(json.dumps(manifest))
    question = recorded.training(of)
    replay, _ = spoken(asked_of(question), steps=tmp_path / "steps")
    content = reply_in(replay).content
    assert list(content) == ["metrics", REPORT_KEY]
    assert content["metrics"] == {"num-examples": 0}
    report = content[REPORT_KEY]
    assert report["failure"] == OUT_OF_MEMORY
    assert "block 1 of 'recorded' needs" in report["detail"]
