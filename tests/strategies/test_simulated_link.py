"""Messages through the link of Flower's simulation, a few at a time."""

from __future__ import annotations

import threading
import uuid

import pytest
from flwr.app import Message, RecordDict
from flwr.common.constant import NOOP_FLWR_AID
from flwr.server.superlink.fleet.vce.vce_api import _register_nodes
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.supercore.constant import (
    FLWR_IN_MEMORY_DB_NAME,
    NOOP_FEDERATION_ID,
    TaskType,
)
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.grid import InMemoryGrid

from lola_flwr.strategies import simulated_link
from lola_flwr.strategies.arrival_grid import ArrivalGrid

NUM_NODES = 12


class Simulation:
    """The link of Flower's simulation; ``answering`` says which nodes do."""

    def __init__(self, answering):
        factory = LinkStateFactory(
            FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory()
        )
        self.nodes = [*_register_nodes(NUM_NODES, factory)]
        self.state = factory.state()
        run_id = self.state.create_run(
            *(None, None, None, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID),
            TaskType.SIMULATION,
        )
        TaskIdentity.run_id = run_id
        self.grid = InMemoryGrid(factory)
        self.grid.set_run(self.state.get_run_info(run_ids=[run_id])[0])
        self.answering = {self.nodes[place] for place in answering}
        self.held, self.asked = 0, []
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._answer)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._is_over.set()
        self._thread.join()

    def _answer(self):
        while not self._is_over.wait(0.001):
            self.held = max(self.held, len(self.state.message_ins_store))
            # As if the last were the fastest.
            for node in reversed(self.nodes):
                for message in self.state.get_message_ins(node_id=node, limit=1):
                    self.asked.append(node)
                    if node in self.answering:
                        reply = Message(RecordDict(), reply_to=message)
                        reply.metadata.__dict__["_message_id"] = str(uuid.uuid4())
                        assert self.state.store_message_res(reply)

    def ask(self, timeout):
        messages = [Message(RecordDict(), node, "train") for node in self.nodes]
        replies = ArrivalGrid(self.grid).send_and_receive(messages, timeout=timeout)
        return [reply.metadata.src_node_id for reply in replies]


@pytest.fixture(autouse=True)
def task(monkeypatch):
    """Flower makes messages only within a task; the link holds three messages."""
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    monkeypatch.setattr(simulated_link, "_LOOKED_AT", 3 * NUM_NODES)
    monkeypatch.setattr(simulated_link, "_PER_CORE", 0)


def test_the_link_holds_few_messages_and_all_are_answered():
    with Simulation(range(NUM_NODES)) as link:
        assert link.ask(timeout=60) == link.nodes
    assert 0 < link.held <= 3
    assert not link.state.message_ins_store


def test_what_is_not_sent_in_time_is_not_sent():
    with Simulation(range(4)) as link:
        assert link.ask(timeout=1) == link.nodes[:4]
    # Three do not answer, and the others wait for their places.
    assert {*link.asked} == {*link.nodes[:7]}


def test_cores_have_enough_to_do(monkeypatch):
    monkeypatch.setattr(simulated_link, "_PER_CORE", 32)
    assert simulated_link._most_at_a_time(10**9) >= 32
    monkeypatch.setattr(simulated_link, "_LOOKED_AT", 25_000)
    assert simulated_link._most_at_a_time(100) >= 250
