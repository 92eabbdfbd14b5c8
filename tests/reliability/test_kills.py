"""Killed at any moment, or write, a run leaves nothing behind, and the next goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[2]
ROUNDS = 40
# By engine: a hundred in all.
KILLS = {"process": 70, "ray": 30}
# What a user, a terminal, a batch system and the system itself end a command with. A
# second Ctrl-C follows an impatient first one.
ENDINGS = (
    (signal.SIGKILL,),
    (signal.SIGTERM,),
    (signal.SIGINT,),
    (signal.SIGINT, signal.SIGINT),
    (signal.SIGTERM, signal.SIGKILL),
)


def start(directory, engine, log):
    """Start the run in a directory, or go on with it."""
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "lola_flwr.cli.main", "simulate", "--plain"),
            *("--engine", engine),
            *(str(ROOT / "simulations" / "glue"), "--devices", "4"),
            *("--out", str(directory / "out"), "--home", str(directory / "home")),
            *("model=random:roberta-tiny", "batch-size=8", "max-length=16"),
            *(f"rounds={ROUNDS}", "eval-every=10", "save-model=true"),
        ],
        cwd=ROOT,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def left_behind(directory):
    """Return the commands of processes that were started for a run's directory."""
    found = []
    for process in psutil.process_iter():
        try:
            words = [*process.cmdline(), *process.environ().values()]
        except psutil.Error:
            continue
        if any(str(directory) in word for word in words) and process.pid != os.getpid():
            found.append(" ".join(process.cmdline())[:100])
    return found


def weights(directory):
    return load_file(directory / "out" / "model" / "model.safetensors")


def rounds(directory):
    path = directory / "out" / "rounds.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["server_round"] for line in lines]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("engine", KILLS)
def test_kills_at_random_moments(tmp_path, rng, capsys, engine):
    whole = tmp_path / "whole"
    whole.mkdir()
    begun = time.monotonic()
    with (whole / "log").open("w") as log:
        assert start(whole, engine, log).wait() == 0, (whole / "log").read_text()
    takes_s = time.monotonic() - begun
    expected = weights(whole)

    kills, ended, resumed = 0, 0, 0
    directory = tmp_path / "killed-0"
    while kills < KILLS[engine] or directory.exists():
        directory.mkdir(exist_ok=True)
        before = rounds(directory)
        with (directory / "log").open("a") as log:
            process = start(directory, engine, log)
            if kills < KILLS[engine]:
                # Also while it starts, while it saves, and after its last round.
                try:
                    process.wait(rng.uniform(0, takes_s))
                except subprocess.TimeoutExpired:
                    for number in ENDINGS[kills % len(ENDINGS)]:
                        process.send_signal(number)
                        time.sleep(0.2)
                    kills += 1
            code = process.wait()
        time.sleep(5)
        assert left_behind(directory) == []
        # But for the last, whose checkpoint may not have been complete.
        kept = before[:-1]
        assert rounds(directory)[: len(kept)] == kept
        resumed += bool(before)
        if code == 0:
            assert rounds(directory) == [*range(1, ROUNDS + 1)]
            got = weights(directory)
            assert got.keys() == expected.keys()
            for name, values in expected.items():
                np.testing.assert_array_equal(got[name], values, err_msg=name)
            ended += 1
            directory = tmp_path / f"killed-{ended}"
    with capsys.disabled():
        print(f"\n{kills} kills; {resumed} starts went on; {ended} runs ended")
    assert ended and resumed


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(
    shutil.which("cc") is None or sys.platform != "linux",
    reason="a C compiler makes what counts system calls, and Linux loads it",
)
def test_1000_kills_at_writes(tmp_path, capsys):
    source = Path(__file__).with_name("kill_at_write.c")
    shim = tmp_path / "kill_at_write.so"
    compiled = ["cc", "-shared", "-fPIC", "-O1", "-o", str(shim), str(source), "-ldl"]
    subprocess.run(compiled, check=True)
    done = subprocess.run(
        [sys.executable, "-m", "tests.reliability.killed_at_writes", "6", "1000"],
        cwd=ROOT,
        env={**os.environ, "LD_PRELOAD": str(shim)},
        capture_output=True,
        text=True,
    )
    with capsys.disabled():
        print(f"\n{done.stdout}")
    assert done.returncode == 0, done.stderr[-2000:]
