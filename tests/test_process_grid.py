"""Devices in one process: what passes between them and the server are copies."""

from __future__ import annotations

import time
from threading import Lock
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from lola_flwr.errors import UserError
from lola_flwr.simulation import grid as grid_module
from lola_flwr.simulation import process
from lola_flwr.simulation.flower_app import read_app
from lola_flwr.simulation.grid import ProcessGrid
from tests.tree import ROOT


@pytest.fixture(autouse=True)
def server():
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1


def message(node, **config):
    values = np.arange(3, dtype=np.float32)
    record = {"config": ConfigRecord(config), "arrays": ArrayRecord([values])}
    return Message(RecordDict(record), node, "train")


def grid_of(train, num_devices=2, **options):
    app = ClientApp()
    app.train()(train)
    nodes = range(2, 2 + num_devices)
    places = {node: {"partition-id": node - 2} for node in nodes}
    return ProcessGrid(
        dict.fromkeys(nodes, app), places, Run.create_empty(1), {"lr": 0.1}, **options
    )


def answer(received, **metrics):
    return Message(RecordDict({"said": MetricRecord(metrics)}), reply_to=received)


def test_replies_come_in_the_order_sent():
    grid = grid_of(lambda m, c: answer(m, x=c.node_config["partition-id"]))
    replies = grid.send_and_receive([message(3), message(2)])
    assert [reply.metadata.src_node_id for reply in replies] == [3, 2]
    assert [reply.content["said"]["x"] for reply in replies] == [1, 0]
    ids = {m.metadata.message_id for m in replies}
    assert len(ids) == 2 and "" not in ids


class Starting:
    """A process that has not loaded yet what it needs: all devices are the server's."""

    def __init__(self):
        self.turn = Lock()

    def is_ready(self):
        time.sleep(0.001)
        return False

    def answer(self, message, context):
        raise AssertionError("It has not started.")

    def forget(self):
        pass


@pytest.mark.parametrize(
    ("processes", "then"), [((), [2, 3, 4, 5]), ((Starting(),), [4, 2, 5, 3])]
)
def test_who_took_longest_begins_where_several_compute(monkeypatch, processes, then):
    asked, takes_s, clock = [], {2: 5.0, 3: 1.0, 5: 2.0}, [0.0]
    monkeypatch.setattr(
        grid_module, "time", SimpleNamespace(monotonic=lambda: clock[0])
    )

    def train(received, context):
        asked.append(context.node_id)
        clock[0] += takes_s.get(context.node_id, 0.0)
        return answer(received, x=context.node_id)

    grid = grid_of(train, 4, processes=processes)
    grid.send_and_receive([message(node) for node in (2, 3, 5)])
    assert asked == [2, 3, 5]
    replies = grid.send_and_receive([message(node) for node in (2, 3, 4, 5)])
    # Of 4 nothing is known.
    assert asked[3:] == then
    assert [reply.content["said"]["x"] for reply in replies] == [2, 3, 4, 5]


def test_devices_share_nothing_that_can_be_changed():
    kept = []

    def train(received, context):
        received.content["config"]["round"] = -1
        context.run_config["lr"] = -1.0
        said = answer(received, x=1)
        kept.append(said)
        return said

    grid = grid_of(train)
    sent = message(2, round=1)
    content = sent.content
    (reply,) = grid.send_and_receive([sent])
    assert content["config"]["round"] == 1
    kept[0].content["said"]["x"] = 2
    assert reply.content["said"]["x"] == 1
    # The arrays' bytes are there once.
    again = Message(content, 3, "train")
    grid.send_and_receive([again])
    assert again.content["arrays"]["0"].data is content["arrays"]["0"].data


def test_a_context_lasts_unless_its_app_fails():
    def train(received, context):
        count = context.state.metric_records.setdefault("n", MetricRecord({"n": 0}))
        count["n"] += 1
        if received.content["config"]["fails"]:
            raise ValueError("no")
        return answer(received, x=count["n"])

    grid = grid_of(train)
    said = []
    for fails in (False, True, False):
        (reply,) = grid.send_and_receive([message(2, fails=fails)])
        said.append(None if reply.has_error() else reply.content["said"]["x"])
    assert said == [1, None, 2]
    (other,) = grid.send_and_receive([message(3, fails=False)])
    assert other.content["said"]["x"] == 1


@pytest.mark.parametrize("error", [KeyError("broken"), UserError("no room")])
def test_an_exception_is_an_error_reply(error, caplog):
    def train(received, context):
        raise error

    with caplog.at_level("ERROR", logger="flwr"):
        (reply,) = grid_of(train).send_and_receive([message(2)])
    assert isinstance(reply.error, Error)
    assert reply.error.code == 2
    assert reply.error.reason == f"{type(error)}:<'{error}'>"
    assert reply.metadata.src_node_id == 2
    (logged,) = caplog.records
    assert bool(logged.exc_info) == isinstance(error, KeyError)
    assert logged.exc_info or logged.getMessage() == "device 2: no room"


def test_a_home_that_nothing_can_be_written_to_is_refused(tmp_path):
    (tmp_path / "file").touch()
    app = read_app(ROOT / "simulations" / "quickstart")
    with (
        pytest.raises(UserError, match="file cannot be written: File exists"),
        process.own_processes(app, num_devices=2, config={}, home=tmp_path / "file"),
    ):
        pass


def test_what_comes_after_the_timeout_is_not_there():
    begun = []

    def train(received, context):
        begun.append(context.node_id)
        if len(begun) == 1:
            time.sleep(0.6)
        return answer(received, x=1)

    grid = grid_of(train, num_devices=3)
    messages = [message(node) for node in (2, 3, 4)]
    assert grid.send_and_receive(messages, timeout=0.5) == []
    assert begun == [2], "the others' turn would come too late"
    assert len(grid.send_and_receive(messages[1:], timeout=60.0)) == 2
    assert grid.send_and_receive(messages, timeout=0.0) == []


def test_pushed_messages_wait_until_their_replies_are_pulled():
    begun = []

    def train(received, context):
        begun.append(context.node_id)
        return answer(received, x=1)

    grid = grid_of(train)
    first, second = grid.push_messages([message(2), message(3)])
    assert begun == []
    (reply,) = grid.pull_messages([second, "unknown"])
    assert begun == [3]
    assert reply.metadata.reply_to_message_id == second
    assert grid.pull_messages([second]) == []
    assert len(grid.pull_messages([first])) == 1


def test_devices_have_threads_of_their_own():
    seen = []

    def train(received, context):
        seen.append(torch.get_num_threads())
        return answer(received, x=1)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        grid_of(train, device_threads=1).send_and_receive([message(2)])
        assert torch.get_num_threads() == 2
        grid_of(train).send_and_receive([message(2)])
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 2]


@pytest.mark.parametrize(
    ("error", "cause", "traceback"),
    [(UserError("too few"), "too few", False), (KeyError("x"), None, True)],
)
def test_only_what_is_no_users_mistake_has_a_traceback(error, cause, traceback, caplog):
    def server_app(grid, context):
        raise error

    with caplog.at_level("ERROR", logger="flwr"):
        assert process._status(server_app, None, None) == ("finished:failed", cause)
    assert any(record.exc_info for record in caplog.records) == traceback
