"""What a message costs in the client's process, beside what an empty one costs.

Every message has a process of its own, as Flower starts it in deployment: what Flower's
``flwr-clientapp`` imports is loaded first, and the clock runs from there to the reply,
less the training itself. SuperLink and SuperNode, which cost the same for any message,
are left out; ``python -m simulations.testbed.overhead`` has them.

Run with ``pytest simulations/benchmarks/bench_worker.py -s``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

import pytest

from lola_flwr.deployment.worker import Worker
from lola_flwr.model.blocks import partition_parameters
from lola_flwr.model.loading import fingerprint, load_classifier
from lola_flwr.wire.packing import VALUES, pack

GLUE = Path(__file__).parents[1] / "glue"
EMPTY = Path(__file__).parents[1] / "testbed" / "empty"
REPEATS = 3
PROCESS = """
import json, sys, time
import numpy as np
import flwr.supernode.runtime.run_clientapp
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
given = json.loads(sys.argv[1])
sys.path.insert(0, given["path"])
content = RecordDict()
if given["assignment"]:
    arrays = np.load(given["arrays"])
    content = RecordDict({
        "arrays": ArrayRecord({name: Array(arrays[name]) for name in arrays}),
        "config": ConfigRecord(given["assignment"]),
    })
message = Message(content, dst_node_id=1, message_type="train")
message.metadata.__dict__["_message_id"] = "1"
context = Context(1, 1, given["node_config"], RecordDict(), given["run_config"])
start = time.perf_counter()
app = __import__(given["module"], fromlist=["app"]).app
reply = app(message, context)
seconds = time.perf_counter() - start
report = dict(reply.content.config_records.get("lola-report", {}))
print(json.dumps([seconds - report.get("compute-s", 0.0), "torch" in sys.modules]))
"""


def message_s(given):
    """Return the seconds of one message, less training, and whether torch came in."""
    done = subprocess.run(
        [sys.executable, "-c", PROCESS, json.dumps(given)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    seconds, torch = json.loads(done.stdout.splitlines()[-1])
    return seconds, torch


@pytest.fixture
def messages(tmp_path):
    """Return what three kinds of message are given; a worker runs for the third."""
    import numpy as np

    model, _ = load_classifier("random:roberta-tiny", num_labels=2)
    names = [name for name, _ in model.named_parameters()]
    partition = partition_parameters(names)
    parameters = dict(model.named_parameters())
    values = {n: parameters[n].numpy(force=True) for n in partition.trainable}
    np.savez(tmp_path / "arrays.npz", **{VALUES: pack(values)})
    config = tomllib.loads((GLUE / "pyproject.toml").read_text())["tool"]["flwr"]
    run_config = {
        **config["app"]["config"],
        "model": "random:roberta-tiny",
        "interface": "message",
        "batch-size": 4,
        "max-length": 16,
    }
    node_config = {
        **{"partition-id": 0, "num-partitions": 1, "name": "a"},
        **{"flops-per-s": 1e9, "memory-bytes": 1e9, "snr-db": 10.0},
    }
    glue = {
        "path": str(GLUE),
        "module": "lola_glue.client_app",
        "arrays": str(tmp_path / "arrays.npz"),
        "assignment": {
            **{"server-round": 1, "block-index": 0, "share": 1.0, "batch-size": 4},
            **{"codec": "fp32"},
            "base-fingerprint": fingerprint(model, partition.frozen),
        },
        "node_config": node_config,
        "run_config": run_config,
    }
    empty = {
        "path": str(EMPTY),
        "module": "lola_empty.client_app",
        "assignment": None,
        "node_config": node_config,
        "run_config": run_config,
    }
    socket_path = tmp_path / "worker.sock"
    worker = Worker(socket_path)
    thread = threading.Thread(target=worker.serve)
    thread.start()
    with_worker = {**glue, "node_config": {**node_config, "worker": str(socket_path)}}
    yield {"empty": empty, "alone": glue, "worker": with_worker}
    worker.stop()
    thread.join()


def test_a_message_with_and_without_a_worker(messages):
    message_s(messages["worker"])  # the first one loads the model
    timed = {kind: [] for kind in messages}
    for _ in range(REPEATS):
        for kind, given in messages.items():
            seconds, has_torch = message_s(given)
            assert has_torch == (kind == "alone")
            timed[kind].append(seconds)
    fastest = {kind: min(seconds) for kind, seconds in timed.items()}
    print()
    for kind, seconds in timed.items():
        beyond_s = fastest[kind] - fastest["empty"]
        print(
            f"{kind:>6}: {fastest[kind]:.3f} s fastest, {max(seconds):.3f} s slowest; "
            f"{beyond_s:.3f} s beyond an empty message"
        )
