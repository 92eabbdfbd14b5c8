"""A device with an exported program beside one with PyTorch: memory, start, step.

Run with ``pytest simulations/benchmarks/bench_exported.py -s``, where the extra
``[export]`` is installed and the native runner can be built. MiniLM-L6, its last and
its first block, 32 examples of 64 tokens, one core, no dropout. Each row is a process
of its own, started anew; its first gradient is counted from its start, imports and
model included, and its memory is the largest resident set. The device with a program is
two processes: Python, which speaks with the server, and the runner, which computes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from simulations.benchmarks import native_runner

BATCH_SIZE, TOKENS = 32, 64


def run(kind, directory, block, *options):
    """Let a device of a kind train; return what it says."""
    module = "simulations.benchmarks.exported_step"
    done = subprocess.run(
        [sys.executable, "-m", module, kind, directory, f"--block={block}", *options],
        cwd=native_runner.ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.timeout(3600)
def test_a_device_without_pytorch(capsys, tmp_path):
    if reason := native_runner.why_not():
        pytest.skip(reason)
    from lola_flwr.export.models import NamedModel, load_exported
    from lola_flwr.export.write import export_steps
    from lola_flwr.wire.packing import pack

    of = load_exported(
        NamedModel(model="minilm-l6"), batch_size=BATCH_SIZE, sequence_length=TOKENS
    )
    last = of.partition.num_blocks - 1
    export_steps(of, tmp_path / "steps", blocks=[0, last])
    parameters = dict(of.model.named_parameters())
    packed = pack({n: parameters[n].numpy(force=True) for n in of.partition.trainable})
    np.save(tmp_path / "values.npy", packed)
    runner = native_runner.built(tmp_path)
    values = f"--values={tmp_path / 'values.npy'}"
    for block in (last, 0):
        torch = run("torch", tmp_path / "steps", block, values)
        native = run("native", tmp_path / "steps", block, values, f"--runner={runner}")
        with capsys.disabled():
            print(f"\nblock {block} of {of.name}, {BATCH_SIZE} x {TOKENS} tokens")
            for name, key, scale in [
                ("memory of what computes, MB", "peak_bytes", 1e6),
                ("first gradient, s", "first_s", 1),
                ("a step, s", "step_s", 1),
            ]:
                one = torch[key] / scale
                key = "runner_bytes" if key == "peak_bytes" else key
                other = native[key] / scale
                print(f"{name:28} {one:8.2f} {other:8.2f}   {other / one:5.2f}")
            both = (native["peak_bytes"] + native["runner_bytes"]) / 1e6
            print(f"{'memory with its Python, MB':28} {'':8} {both:8.2f}", flush=True)
        assert native["loss"] == pytest.approx(torch["loss"], rel=1e-5)
        assert native["gradient"] == pytest.approx(torch["gradient"], rel=1e-4)
    own, system = native_runner.installed_bytes(runner)
    with capsys.disabled():
        print(f"installed: {own / 1e6:.1f} MB, and {system / 1e6:.1f} MB of the system")
