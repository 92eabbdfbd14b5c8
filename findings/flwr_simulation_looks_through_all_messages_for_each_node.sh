#!/usr/bin/env bash
# flwr 1.42.0: each pass of the simulation's link costs messages x nodes.
# A good engineer expects a round of four times as many devices to cost four times as much. The
# simulation asks its in-memory link for every node's next message, ten times a second, and each
# question looks through all messages that are stored, answered ones that nobody has fetched
# included: 500 messages for 500 nodes take half a second of the interpreter a pass.
# Seen: an empty pass takes some 16 times as long with 400 messages and nodes as with 100.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet 'flwr[simulation]==1.42.0'
export FLWR_TELEMETRY_ENABLED=0 FLWR_HOME="$dir/home"
cat > "$dir/seen.py" <<'P'
import time
from uuid import uuid4

from flwr.app import Message, RecordDict
from flwr.common.constant import NOOP_FLWR_AID
from flwr.server.superlink.fleet.vce.vce_api import _register_nodes
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID, TaskType
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager


def pass_s(count):
    """Return how long it takes to find that no node has another message."""
    link = LinkStateFactory(
        FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory()
    )
    state = link.state()
    nodes = [*_register_nodes(count, link)]
    run_id = state.create_run(
        fab_id="", fab_version="", fab_hash="", override_config={},
        federation_id=NOOP_FEDERATION_ID, federation_config=None,
        flwr_aid=NOOP_FLWR_AID, primary_task_type=TaskType.SIMULATION,
    )
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = run_id, 1, 1
    for node in nodes:
        message = Message(RecordDict(), node, "train", group_id="1")
        own = message.metadata.__dict__
        own |= {"_message_id": str(uuid4()), "_run_id": run_id, "_src_node_id": 1}
        assert state.store_message_ins(message)
    assert sum(len(state.get_message_ins(node_id=n, limit=1)) for n in nodes) == count
    begun = time.thread_time()
    assert not any(state.get_message_ins(node_id=node, limit=1) for node in nodes)
    return time.thread_time() - begun


few, many = (min(pass_s(count) for _ in range(3)) for count in (100, 400))
print(f"100: {few:.4f} s, 400: {many:.4f} s, {many / few:.1f} times as long")
print("quadratic:", many > 8 * few)
P
"$dir/venv/bin/python" "$dir/seen.py" 2>/dev/null | tee "$dir/out"
grep -q "quadratic: True" "$dir/out"
