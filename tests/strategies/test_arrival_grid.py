from __future__ import annotations

import threading
import time

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from lola_flwr.strategies.arrival_grid import ArrivalGrid
from lola_flwr.wire.records import OURS, REPORT_KEY


@pytest.fixture(autouse=True)
def task(monkeypatch):
    """Flower makes messages only within a task."""
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


class Slow(HttpGrid):
    """A deployment's Grid whose fetches last as long as an upload does.

    ``announced_s`` says when each node announces its reply, ``upload_s`` how long its
    arrays take from then on; None is never. Nodes that upload ``together`` begin when
    all of them can.
    """

    def __init__(self, announced_s, upload_s, together=()):
        self.together = dict.fromkeys(
            together, threading.Barrier(max(1, len(together)))
        )
        self.announced_s, self.upload_s = announced_s, upload_s
        self.messages = {}
        self.fetching = []
        self.lock = threading.Lock()

    def content_of(self, node):
        return RecordDict()

    def push_messages(self, messages):
        self.start = time.monotonic()
        for message in messages:
            node = message.metadata.dst_node_id
            message.metadata.__dict__["_message_id"] = f"id-{node}"
            self.messages[f"id-{node}"] = message
        return list(self.messages)

    def pull_messages(self, message_ids):
        replies = []
        for message_id in list(message_ids):
            message = self.messages[message_id]
            node = message.metadata.dst_node_id
            announced_s = self.announced_s[node]
            if announced_s is None or time.monotonic() - self.start < announced_s:
                continue
            with self.lock:
                self.fetching.append(node)
            if node in self.together:
                self.together[node].wait(timeout=60)
            time.sleep(self.upload_s[node])
            reply = Message(self.content_of(node), reply_to=message)
            reply.metadata.__dict__["_src_node_id"] = node
            replies.append(reply)
        return replies


def ask(nodes):
    return [
        Message(RecordDict(), dst_node_id=node, message_type="train") for node in nodes
    ]


def test_uploads_are_timed_from_their_announcement_side_by_side():
    announced_s, upload_s = {1: 0.0, 2: 0.3, 3: 0.0}, {1: 1.0, 2: 0.5, 3: 0.1}
    slow = Slow(announced_s, upload_s, together=(1, 2))
    grid = ArrivalGrid(slow)
    start = time.monotonic()
    replies = grid.send_and_receive(ask([1, 2, 3]), timeout=120)
    took = time.monotonic() - start
    # In the order sent, whoever came first.
    assert [reply.metadata.src_node_id for reply in replies] == [1, 2, 3]
    assert sorted(slow.fetching) == [1, 2, 3]
    assert grid.arrivals.keys() == {"1", "2", "3"}
    for node, seconds in slow.upload_s.items():
        arrival = grid.arrivals[str(node)]
        assert arrival.upload_s >= seconds
        assert took > arrival.answered_s >= slow.announced_s[node] + seconds


def test_what_is_late_is_not_waited_for():
    grid = ArrivalGrid(Slow({1: 0.0, 2: None, 3: 0.0}, {1: 0.0, 3: 30.0}))
    start = time.monotonic()
    replies = grid.send_and_receive(ask([1, 2, 3]), timeout=1)
    assert time.monotonic() - start < 20
    assert [reply.metadata.src_node_id for reply in replies] == [1]
    assert grid.arrivals.keys() == {"1"}


def test_what_flower_raises_ends_the_round():
    class Broken(Slow):
        def pull_messages(self, message_ids):
            raise ConnectionError("gone")

    with pytest.raises(ConnectionError, match="gone"):
        ArrivalGrid(Broken({}, {})).send_and_receive(ask([1]), timeout=5)


def test_the_wait_follows_the_replies_that_are_there():
    grid = ArrivalGrid(Slow({1: 0.0, 2: 0.3, 3: None}, {1: 0.0, 2: 0.0}))
    seen = []

    def wait_s(came_s, failed):
        assert not failed
        seen.append(len(came_s))
        return 0.5 if len(came_s) == 2 else 60.0

    start = time.monotonic()
    replies = [*grid.receive(ask([1, 2, 3]), wait_s, timeout=None)]
    assert time.monotonic() - start < 30
    assert [reply.metadata.src_node_id for reply in replies] == [1, 2]
    assert {1, 2} <= set(seen) <= {0, 1, 2}
    assert grid.arrivals["2"].answered_s >= 0.3 > grid.arrivals["1"].answered_s


@pytest.mark.parametrize(
    ("record", "content"),
    [
        (REPORT_KEY, {"failure": "out-of-memory"}),
        ("fitres.metrics", {f"{OURS}update-kind": "nothing", "update-kind": "mine"}),
    ],
)
def test_who_fails_at_once_says_nothing_of_how_long_the_others_take(record, content):
    class Failing(Slow):
        def content_of(self, node):
            failed = {record: ConfigRecord(content)} if node < 3 else {}
            return RecordDict(failed)

    grid = ArrivalGrid(
        Failing({1: 0.0, 2: 0.0, 3: 0.0, 4: 0.3}, dict.fromkeys(range(5), 0.0))
    )
    seen = []

    def wait_s(came_s, failed):
        seen.append((len(came_s), failed))
        return 20.0

    assert len([*grid.receive(ask([1, 2, 3, 4]), wait_s, timeout=None)]) == 4
    assert seen[-1] == (1, 2)
