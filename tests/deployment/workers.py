"""Workers of a toy app, served in this process."""

from __future__ import annotations

import time
from types import SimpleNamespace

from lola_flwr.wire.records import Assignment

TOY = "toy_app.device:device_fn"


def context(run_id=1, **run_config):
    return SimpleNamespace(
        run_id=run_id, node_id=7, node_config={}, run_config=run_config
    )


def assignment(**changes):
    fields = {
        "server_round": 3,
        "block_index": 1,
        "share": 0.25,
        "batch_size": 4,
        "codec": "fp32",
        "base_fingerprint": "",
        "uplink_bps": 1e6,
    }
    return Assignment(**{**fields, **changes})


class Limit:
    def __init__(self):
        self.held = []

    def hold_to(self, limit_bps, upload_bytes):
        self.held.append((limit_bps, upload_bytes))
        return "pacing"

    def describe(self):
        return "toy"

    def counters(self):
        return {"sent_bytes": 7}

    def close(self):
        self.held.append("closed")


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
