"""All devices answer the recorded messages, with the same bytes."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from lola_flwr.export.data import ArrayFiles
from lola_flwr.export.device import ExportedDevice
from tests.export.small import TorchRunner, scratch, written
from tests.marks import rest_slow
from tests.protocol import recorded
from tests.protocol.compare import assert_same_reply
from tests.protocol.conversation import PULL, answered, asked, names, read

PAGE = Path(__file__).parents[2] / "docs" / "protocol.md"
KINDS = ["torch", "program"]
TALKS = [name for name in names() if name != "join"]
QUICK = ["train-fp32", "held", *recorded.PROFILES, "refused-model", "evaluate"]
ORDERED = QUICK + [name for name in TALKS if name not in QUICK]
# A device says of itself what it is.
SAID = {"profile": ["torch"], "profile-programs": ["program"]}
CASES = [(kind, name) for name in ORDERED for kind in SAID.get(name, KINDS)]


@pytest.fixture(scope="module")
def of():
    return recorded.what_is_exported()


@pytest.fixture(scope="module")
def devices(of):
    manifest = written(of, scratch() / "steps")
    return {
        "torch": recorded.device(of),
        "program": ExportedDevice(
            profile=replace(recorded.PROFILE, num_examples=9),
            manifest=manifest,
            runner=TorchRunner(of, manifest),
            batch_source=ArrayFiles(arrays=recorded.examples(), seed=recorded.SEED),
            simulated_compute_s=lambda _: 1.5,
        ),
    }


@pytest.mark.parametrize(
    ("kind", "name"),
    rest_slow(CASES, fast=sum(name in QUICK for _, name in CASES)),
)
def test_devices_answer_with_the_recorded_bytes(devices, kind, name):
    exchanges = read(name)
    reply = recorded.reply_of(devices[kind], asked(exchanges))
    assert_same_reply(reply, answered(exchanges).inflated())


def test_what_the_server_asks_is_what_was_recorded(of):
    """A recording that is no longer what the server sends has to be made anew."""
    now = recorded.questions(of)
    assert now.keys() == set(TALKS)
    for name, question in now.items():
        was = asked(read(name))
        assert question.metadata.message_type == was.metadata.message_type
        assert {**question.content.config_records} == {**was.content.config_records}
        assert {**question.content.array_records} == {**was.content.array_records}


def test_the_page_names_every_path_and_key():
    page = PAGE.read_text()
    for name in names():
        assert f"`{name}`" in page
        for exchange in read(name):
            assert exchange.path.rpartition("/")[2] in page
    for name in TALKS:
        for message in (asked(read(name)), answered(read(name)).inflated()):
            if not message.has_error():
                for record in message.content.config_records.values():
                    assert all(re.search(rf"[`\"]{key}[`\"]", page) for key in record)


def test_values_come_in_several_chunks():
    """So that a client that puts them together wrongly is noticed."""
    exchanges = read("train-fp32")
    assert sum(e.path.endswith("pull-object") for e in exchanges) >= 8
    assert [e.path for e in exchanges].count(PULL) == 1
