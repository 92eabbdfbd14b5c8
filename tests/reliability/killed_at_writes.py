"""Kills runs at their writes, and lets them go on: all must come to the same end.

Started by ``test_kills.py``, with ``kill_at_write.c`` loaded before all libraries.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import os
import signal
import sys
import tempfile
from functools import partial
from itertools import cycle, product
from pathlib import Path

from tests.reliability.tiny_run import run


def ended(coordinator, directory):
    """Return a digest of the model, the optimizer and the log."""
    snapshot = coordinator.snapshot()
    digest = hashlib.sha256()
    for name in sorted(snapshot.arrays):
        digest.update(name.encode() + snapshot.arrays[name].tobytes())
    log = (directory / "rounds.jsonl").read_text().splitlines()
    rounds = [json.loads(line)["server_round"] for line in log]
    return f"{digest.hexdigest()} {rounds}"


def in_child(function):
    """Run a function in a fork of this process: what it returns, or None if killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.write(writing, json.dumps(function()).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        said = file.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, status
        return None
    assert os.WEXITSTATUS(status) == 0, "the run failed"
    return json.loads(said)


def kill_all_over(interface, num_rounds, kills, scratch):
    """Kill runs until there are so many kills; print how many, and at how many calls.

    What one kill leaves behind the next start goes on with, to be killed as well; a run
    whose next kill does not come ends, and another begins.
    """
    shim = ctypes.CDLL(None)

    def go(directory, call=-1, half_done=False):
        shim.kill_at(str(directory).encode(), ctypes.c_long(call), int(half_done))
        coordinator = run(directory, num_rounds=num_rounds, interface=interface)
        return [ended(coordinator, directory), shim.calls_seen()]

    whole, calls = in_child(partial(go, scratch / "whole"))
    done = dict.fromkeys(product(range(calls), (False, True)), 0)
    # Early and late ones in turn.
    places = cycle(sorted(done, key=lambda place: (7 * place[0] % calls, place)))
    runs = 0
    while sum(done.values()) < kills:
        place = next(places)
        end = in_child(partial(go, scratch / f"{runs}", *place))
        if end is None:
            done[place] += 1
        else:
            assert end[0] == whole, f"{interface}: run {runs} has another end"
            runs += 1
    last = in_child(partial(go, scratch / f"{runs}"))
    assert last[0] == whole, f"{interface}: the last run has another end"
    print(
        f"{interface}: {kills} kills at {sum(map(bool, done.values()))} of {len(done)} "
        f"places, {runs + 1} runs with the same end",
        flush=True,
    )


def main(num_rounds, kills):
    logging.getLogger("flwr").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as scratch:
        # What a run imports and builds first is there in all forks.
        run(Path(scratch) / "first", num_rounds=1)
        for interface in ("message", "legacy"):
            below = Path(scratch) / interface
            below.mkdir()
            kill_all_over(interface, num_rounds, kills // 2, below)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
