from __future__ import annotations

import pytest
from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common import Code, FitRes, Parameters, Status
from flwr.compat.common.recorddict_compat import fitres_to_recorddict
from flwr.serverapp import Grid
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity

from lola_flwr.errors import UserError
from lola_flwr.strategies import LegacyGrid
from lola_flwr.wire.records import SECAGG_KEY


@pytest.fixture(autouse=True)
def task(monkeypatch):
    """Flower makes messages only within a task."""
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


class Canned(Grid):
    """A Grid that answers with what it was given, and notes how long it may wait."""

    def __init__(self, replies):
        self.replies = replies
        self.timeout = None

    def send_and_receive(self, messages, *, timeout=None):
        self.timeout = timeout
        return self.replies

    set_run = run = create_message = get_node_ids = None
    push_messages = pull_messages = None


def train_reply(content):
    ask = Message(RecordDict(), dst_node_id=7, message_type="train")
    ask.metadata.__dict__["_message_id"] = "1"
    return Message(content, reply_to=ask)


def fit_result():
    result = FitRes(Status(Code.OK, ""), Parameters([b"abc"], "numpy.ndarray"), 3, {})
    return fitres_to_recorddict(result, keep_input=True)


def test_readable_replies_and_errors_pass():
    good, error = train_reply(fit_result()), train_reply(Error(code=0, reason="oom"))
    grid = LegacyGrid(Canned([good, error]), wait_s=lambda *_: 5)
    assert grid.send_and_receive([]) == [good, error]
    assert good.content.array_records["fitres.parameters"]["0"].data == b"abc"


def test_unreadable_replies_are_not_there():
    no_records = train_reply(RecordDict())
    lists = fit_result()
    lists.config_records["fitres.metrics"] = ConfigRecord({"loss": [1.0, 2.0]})
    no_status = fit_result()
    del no_status["fitres.status"]
    bad_count = fit_result()
    bad_count.metric_records["fitres.num_examples"] = MetricRecord({"other": 1})
    replies = [no_records, *map(train_reply, (lists, no_status, bad_count))]
    assert LegacyGrid(Canned(replies), wait_s=lambda *_: 5).send_and_receive([]) == []


def test_waits_as_long_as_told():
    canned = Canned([])
    LegacyGrid(canned, wait_s=lambda *_: 5).send_and_receive([])
    assert canned.timeout == 5
    LegacyGrid(canned, wait_s=lambda *_: 5).send_and_receive([], timeout=2)
    assert canned.timeout == 2


def test_secure_aggregation_is_refused():
    content = RecordDict({SECAGG_KEY: ConfigRecord({"stage": "setup"})})
    message = Message(content, dst_node_id=7, message_type="train")
    with pytest.raises(UserError, match="take the SecAgg mod and workflow out"):
        LegacyGrid(Canned([]), wait_s=lambda *_: 5).send_and_receive([message])


def test_what_asks_for_nodes_after_the_end_is_told_to_end():
    """Flower's thread does so for ever where its workflow ends by an exception."""

    class Connected(Canned):
        def get_node_ids(self):
            return [7]

    grid = LegacyGrid(Connected([]), wait_s=lambda *_: 5)
    assert grid.get_node_ids() == [7]
    grid.end()
    with pytest.raises(RunNotRunningException):
        grid.get_node_ids()
