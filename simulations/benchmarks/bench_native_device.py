"""A native device beside one with PyTorch: all that it takes, not its program alone.

Run with ``pytest simulations/benchmarks/bench_native_device.py -s``, where the native
device can be built. MiniLM-L6, its last block, 32 examples of 64 tokens, one core, no
dropout. The native device is one process: it joins a server that speaks a conversation,
fetches the values, and pushes its gradients. Its first gradient is there when the
server has it, from the start of the process, in seconds and in those of them that it
had the core; its memory is the largest proportional set size (PSS) that samples saw,
and what it says itself, its largest resident set. Both count pages of files that it has
mapped. Where PyTorch trains, it is the process of bench_exported: imports, model and
training; once as it is, and once with what `lola-flwr node` has loaded beside it, which
speaks with the server as the native device does.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time

import numpy as np
import pytest

from lola_flwr.wire.packing import pack
from lola_flwr.wire.records import REPORT_KEY
from simulations.benchmarks import native_runner
from simulations.benchmarks.bench_exported import BATCH_SIZE, TOKENS, run
from simulations.benchmarks.exported_step import make_batch
from tests.protocol import recorded
from tests.protocol.conversation import answered
from tests.protocol.replay import Replay, serving

ROUNDS = 3
SAMPLE_S, WAIT_S = 0.02, 600


def pss_bytes(pid):
    """Return a process's proportional set size."""
    with open(f"/proc/{pid}/smaps_rollup") as file:
        return 1024 * int(re.search(r"^Pss: +(\d+) kB", file.read(), re.M)[1])


def cpu_s(pid):
    """Return the seconds that a process had a core."""
    with open(f"/proc/{pid}/stat") as file:
        words = file.read().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def trained(device, directory, question):
    """Let a device answer a question; return its report, its seconds and its PSS."""
    replay = Replay(recorded.conversation(question, recorded.reply_of(None, question)))
    begin = time.perf_counter()
    with serving(replay) as address:
        process = subprocess.Popen(
            [
                *(device, directory / "steps", "--superlink", address, "--insecure"),
                *("--profile", directory / "device.json", "--data", directory / "data"),
            ],
            stderr=subprocess.DEVNULL,
            # One core, as the device with PyTorch has.
            preexec_fn=lambda: os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]),
        )
        peak, deadline = 0, begin + WAIT_S
        while not replay.pushed.wait(SAMPLE_S) and time.perf_counter() < deadline:
            peak = max(peak, pss_bytes(process.pid))
        took_s, had_s = time.perf_counter() - begin, cpu_s(process.pid)
        process.terminate()
        assert process.wait(60) == 0
    reply = answered([e for e in replay.heard if "/push-" in e.path]).inflated()
    return reply.content[REPORT_KEY], took_s, had_s, peak


@pytest.mark.timeout(3600)
def test_a_native_device(capsys, tmp_path):
    if reason := native_runner.why_no_device():
        pytest.skip(reason)
    from lola_flwr.export.models import NamedModel, load_exported
    from lola_flwr.export.write import export_steps

    of = load_exported(
        NamedModel(model="minilm-l6"), batch_size=BATCH_SIZE, sequence_length=TOKENS
    )
    last = of.partition.num_blocks - 1
    manifest = export_steps(of, tmp_path / "steps", blocks=[last])
    packed = pack(recorded.values_of(of))
    np.save(tmp_path / "values.npy", packed)
    (tmp_path / "data").mkdir()
    for name, array in make_batch(manifest).items():
        np.save(tmp_path / "data" / f"{name}.npy", array)
    (tmp_path / "device.json").write_text(
        json.dumps({"lola-flwr-profile": 1, **recorded.PROFILE.to_properties()})
    )
    device = native_runner.built(tmp_path).with_name("lola-device")
    values = f"--values={tmp_path / 'values.npy'}"
    torch = run("torch", tmp_path / "steps", last, values)
    node = run("node", tmp_path / "steps", last, values)
    question = recorded.training(of, block_index=last)
    told = [trained(device, tmp_path, question) for _ in range(ROUNDS)]
    with capsys.disabled():
        print(f"\nblock {last} of {of.name}, {BATCH_SIZE} x {TOKENS} tokens")
        reports, took_s, had_s, peaks = zip(*told, strict=True)
        largest = max(report["peak-memory-bytes"] for report in reports) / 1e6
        compute_s = min(report["compute-s"] for report in reports)
        print(f"{'':28}  PyTorch and node   native   ratio to each")
        for name, key, scale, own in [
            ("largest resident set, MB", "peak_bytes", 1e6, largest),
            ("first gradient, s", "first_s", 1, min(took_s)),
            ("first gradient, s of a core", "first_cpu_s", 1, min(had_s)),
            ("its computation, s", "step_s", 1, compute_s),
        ]:
            one, other = torch[key] / scale, node[key] / scale
            print(
                f"{name:28} {one:8.2f} {other:8.2f} {own:8.2f}   {own / one:5.2f} "
                f"{own / other:5.2f}",
                flush=True,
            )
        print(f"its largest PSS: {max(peaks) / 1e6:.1f} MB")
        own, system = native_runner.installed_bytes(device)
        print(f"installed: {own / 1e6:.1f} MB, and {system / 1e6:.1f} MB of the system")
    for report in reports:
        assert report["loss"] == pytest.approx(torch["loss"], rel=1e-5)
