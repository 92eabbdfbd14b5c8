"""Devices in processes beside the server's: the same replies, and nothing left."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from lola_flwr.errors import UserError
from lola_flwr.simulation import device_processes as module
from lola_flwr.simulation.device_processes import device_processes, num_places
from lola_flwr.simulation.flower_app import FlowerApp
from lola_flwr.simulation.grid import ProcessGrid
from lola_flwr.simulation.link import Inbox, Link, Outbox

ROOT = Path(__file__).parent.parent

# Where they wait, a device of the server's process does what it does when one of the
# other process has answered, and that one when the former has begun.
APP = """
import os, signal, time
from logging import INFO
from pathlib import Path
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.logger import log

app = ClientApp()
prepared = []

def prepare(config):
    while not (Path(config["where"]) / "go").exists():
        time.sleep(0.01)
    prepared.append(config["where"])

@app.train()
def train(message, context):
    where = Path(context.run_config["where"])
    config = message.content["config"]

    def wait_for(name):
        while config["waits"] and not (where / name).exists():
            time.sleep(0.01)

    if os.getpid() == config["server"]:
        (where / "begun").touch()
        wait_for("answered")
    else:
        (where / "pid").write_text(str(os.getpid()))
        if config["does"] == "die":
            (where / "answered").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if config["does"] == "hang":
            time.sleep(600)
        wait_for("begun")
    count = context.state.metric_records.setdefault("n", MetricRecord({"n": 0}))
    count["n"] += 1
    context.state["kept"] = message.content["arrays"]
    log(INFO, "device %s is here", context.node_id)
    (where / "answered").touch()
    if config["does"] == "raise":
        raise ValueError("no")
    said = {"n": count["n"], "pid": os.getpid(), "prepared": len(prepared)}
    content = {"said": MetricRecord(said), "arrays": message.content["arrays"]}
    return Message(RecordDict(content), reply_to=message)
"""


@pytest.fixture(autouse=True)
def server():
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1


@contextmanager
def grid_of(where, name, num_devices=2):
    """Give a grid of devices in this process, and in another one."""
    (where / f"{name}.py").write_text(APP)
    sys.path.insert(0, str(where))
    components = {"clientapp": f"{name}:app"}
    app = FlowerApp(where, name, {}, components, prepare=f"{name}:prepare")
    config = {"where": str(where)}
    try:
        with device_processes(1, app, config, 1) as processes:
            here = __import__(name).app
            nodes = range(2, 2 + num_devices)
            run = Run.create_empty(1)
            yield ProcessGrid(dict.fromkeys(nodes, here), {}, run, config, 1, processes)
    finally:
        sys.path.remove(str(where))


def messages(does, nodes=(2, 3), waits=True):
    arrays = ArrayRecord([np.arange(5, dtype=np.float32), np.zeros((0, 2))])
    told = {"does": does, "server": os.getpid(), "waits": waits}
    config = ConfigRecord(told)
    content = RecordDict({"config": config, "arrays": arrays})
    return [Message(content, node, "train") for node in nodes]


def begin(where):
    for name in ("begun", "answered"):
        (where / name).unlink(missing_ok=True)


def stopped(pid):
    """Whether a process ends soon."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_devices_in_two_processes_are_as_in_one(tmp_path, caplog):
    with grid_of(tmp_path, "both") as grid, caplog.at_level("INFO", logger="flwr"):
        # A process that is not ready takes no device.
        for reply in grid.send_and_receive(messages("train", waits=False)):
            assert reply.content["said"]["pid"] == os.getpid()
        (tmp_path / "go").touch()
        there = []
        for number in (2, 3):
            begin(tmp_path)
            sent = messages("train")
            replies = grid.send_and_receive(sent)
            # In the order sent, and with what each device kept.
            assert [r.metadata.src_node_id for r in replies] == [2, 3]
            assert [r.content["said"]["n"] for r in replies] == [number, number]
            for reply, message in zip(replies, sent, strict=True):
                assert reply.content["arrays"] == message.content["arrays"]
                assert reply.metadata.reply_to_message_id == message.metadata.message_id
            said = [reply.content["said"] for reply in replies]
            (other,) = [one for one in said if one["pid"] != os.getpid()]
            there.append(other)
            # What the other process says is logged here.
            assert {"device 2 is here", "device 3 is here"} <= {*caplog.messages}
        assert [said["prepared"] for said in there] == [1, 1]
        # Which process kept a device's context does not matter.
        begin(tmp_path)
        first, second = grid.send_and_receive(messages("train", [3, 2]))
        assert first.content["said"]["n"] == second.content["said"]["n"] == 4
        # An app that raises is Flower's error reply, and nothing of it is kept.
        begin(tmp_path)
        for reply in grid.send_and_receive(messages("raise")):
            assert reply.error.code == 2
            assert reply.error.reason == "<class 'ValueError'>:<'no'>"
        begin(tmp_path)
        for reply in grid.send_and_receive(messages("train")):
            assert reply.content["said"]["n"] == 5
        # One device's messages are computed one after the other.
        twice = grid.send_and_receive(messages("train", [2, 3, 2, 2]))
        assert [r.content["said"]["n"] for r in twice] == [6, 6, 7, 8]
        assert grid.send_and_receive([]) == []
        # The end of a process is named, and the run's.
        (pid,) = {said["pid"] for said in there}
        said = rf"process of devices \({pid}\) was ended by SIGKILL.*start again"
        begin(tmp_path)
        with pytest.raises(UserError, match=said):
            grid.send_and_receive(messages("die"))
        assert any(f"({pid}) was ended by SIGKILL" in m for m in caplog.messages)


def test_a_process_that_computes_does_not_outlive_the_server(tmp_path):
    (tmp_path / "go").touch()
    with grid_of(tmp_path, "hangs") as grid:
        (process,) = grid._processes
        while not process.is_ready():
            pass
        (message, _), context = messages("hang"), grid._context(2)
        work = grid._threads.submit(process.answer, message, context)
        while not (tmp_path / "pid").exists():
            time.sleep(0.01)
        pid = int((tmp_path / "pid").read_text())
    assert stopped(pid)
    with pytest.raises(UserError, match="ended"):
        work.result()


@pytest.mark.parametrize("content", ["records", "error"])
def test_messages_arrive_as_they_were_sent(content):
    shared = np.arange(6.0).reshape(2, 3)
    arrays = ArrayRecord({"a": Array(shared), "b": Array(np.array(1, np.int64))})
    records = {
        "arrays": arrays,
        "config": ConfigRecord({"x": [1, 2**63], "b": b"\0", "on": True, "s": ["ü"]}),
        "none": ArrayRecord(),
        "metrics": MetricRecord({"loss": float("inf"), "l": [0.5]}),
    }
    sent = Message(RecordDict(records), 7, "train.own", ttl=5.0, group_id="3")
    sent.metadata.__dict__["_message_id"] = "first"
    if content == "error":
        sent = Message(Error(3, "no"), reply_to=sent)
    context = Context(1, 7, {"p": 1}, RecordDict({"kept": arrays}), {"lr": 0.1})
    outbox, inbox = Outbox(), Inbox()
    one, other = socket.socketpair()
    with one, other:
        for left in (None, context, context):
            Link(one).send(b"?", *outbox.parts(sent, left))
            kind, parts = Link(other).receive()
            got, got_context = inbox.message(parts)
            assert kind == b"?"
            assert got.metadata.__dict__ == sent.metadata.__dict__
            assert got_context == left
            if content == "error":
                assert got.error.__dict__ == sent.error.__dict__
            else:
                assert got.content == sent.content
                assert [*got.content] == [*records]
        # What the last message had, too, does not travel again.
        assert sum(map(len, parts[3:])) == 0
        outbox.forget()
        assert sum(map(len, [*outbox.parts(sent, context)][3:])) > 0
        one.close()
        with pytest.raises(EOFError):
            Link(other).receive()


def test_as_many_compute_at_a_time_as_there_are_cpus_for(monkeypatch):
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: {*range(8)})
    counts = {(6, 1): 6, (20, 1): 8, (20, 3): 2, (20, 9): 1, (1, 1): 1}
    assert {asked: num_places(*asked) for asked in counts} == counts


def heed_signals():
    """Undo what nohup and shells do to commands in the background."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL, None]
)
def test_nothing_is_left_of_a_command_that_ends(tmp_path, number):
    """With None a process of devices is killed, which ends the command."""
    if number is not signal.SIGKILL and len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one process on one CPU")
    command = [sys.executable, "-m", "lola_flwr.cli.main", "simulate"]
    command += [str(ROOT / "simulations" / "glue"), "--devices", "4"]
    command += ["--home", str(tmp_path / "home"), "--out", str(tmp_path / "out")]
    words = ["model=random:roberta-tiny", "rounds=100000", "eval-every=100000"]
    with subprocess.Popen(
        [*command, *words],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=heed_signals,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("round 2:"):
                break
        listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        children = [int(pid) for pid in listed.split()]
        assert len(children) == min(4, len(os.sched_getaffinity(0))) - 1
        os.kill(children[0] if number is None else process.pid, number or 9)
        rest = process.stdout.read()
        code = process.wait()
    assert all(map(stopped, children))
    if number is None:
        assert code == 1
        last = rest.splitlines()[-1]
        assert last.startswith(f"error: A process of devices ({children[0]}) was ended")
    elif number in (signal.SIGINT, signal.SIGTERM):
        assert (code, rest.splitlines()[-1]) == (130, "stopped")
