"""A device's first gradients in a process of its own; prints one line of JSON.

Run with ``python -m simulations.benchmarks.exported_step KIND DIRECTORY --block 5``, as
bench_exported does.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np

from lola_flwr.machine.files import local_path

STEPS = 3


def since_start_s():
    """Return the seconds since this process was started."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return uptime - ticks / os.sysconf("SC_CLK_TCK")


def make_batch(manifest):
    """Draw a whole batch of random tokens."""
    rng = np.random.default_rng(0)
    batch = {s.name: np.ones(s.shape, s.dtype) for s in manifest.batch}
    tokens = rng.integers(5, 30_000, batch["input_ids"].shape)
    batch["input_ids"] = tokens.astype(np.int64)
    if "token_type_ids" in batch:
        batch["token_type_ids"] *= 0
    labels = rng.integers(0, 2, len(tokens))
    batch["labels"] = tokens if batch["labels"].ndim > 1 else labels
    return batch


def torch_device(args, manifest):
    """Return a device with PyTorch, which loads its model as those of a run do."""
    import torch

    from lola_flwr.device.block_device import BlockDevice
    from lola_flwr.model.adapter_blocks import model_partition
    from lola_flwr.model.loading import load_classifier
    from lola_flwr.system.devices import DeviceProfile

    torch.set_num_threads(1)
    model, _ = load_classifier(manifest.model, num_labels=2)
    # As programs compute; dropout alone would make other losses.
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    partition = model_partition(model)
    batch = {n: torch.from_numpy(a) for n, a in make_batch(manifest).items()}
    return BlockDevice(
        profile=DeviceProfile("torch", 1e10, 8e9),
        load_model=lambda: (model, partition),
        batch_source=lambda *_: batch,
    )


def node_device(args, manifest):
    """Return a device with PyTorch, beside what `lola-flwr node` has loaded."""
    import flwr.supernode.fleet_http_connection  # noqa: F401

    import lola_flwr.clients.client_app
    import lola_flwr.deployment.node.serve  # noqa: F401

    return torch_device(args, manifest)


def exported_device(args, manifest):
    """Return a device with programs."""
    from lola_flwr.export.device import ExportedDevice
    from lola_flwr.export.runner import NativeRunner
    from lola_flwr.system.devices import DeviceProfile

    batch = make_batch(manifest)
    return ExportedDevice(
        profile=DeviceProfile("native", 1e10, 8e9),
        manifest=manifest,
        runner=NativeRunner(args.runner, args.directory, manifest),
        batch_source=lambda *_: batch,
    )


KINDS = {"torch": torch_device, "node": node_device, "native": exported_device}


def main():
    from lola_flwr.export.manifest import read_manifest
    from lola_flwr.machine.memory import peak_memory_bytes
    from lola_flwr.wire.packing import GRADIENTS, VALUES
    from lola_flwr.wire.records import Assignment

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("directory", type=local_path)
    parser.add_argument("--block", type=int, required=True)
    parser.add_argument("--values", type=local_path, required=True)
    parser.add_argument("--runner", type=local_path)
    args = parser.parse_args()
    # The runner, too, which has as many threads as there are cores.
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    manifest = read_manifest(args.directory)
    device = KINDS[args.kind](args, manifest)
    asked = Assignment(
        server_round=1,
        block_index=args.block,
        share=1.0,
        batch_size=manifest.batch_size,
        codec="fp32",
        base_fingerprint=manifest.base_fingerprint,
    )
    values = {VALUES: np.load(args.values)}
    first_s, first_cpu_s, steps_s = None, None, []
    for _ in range(1 + STEPS):
        begin = time.perf_counter()
        update = device.train(asked, values)
        steps_s.append(time.perf_counter() - begin)
        first_s = first_s or since_start_s()
        first_cpu_s = first_cpu_s or time.process_time()
    gradients = update.arrays[GRADIENTS]
    print(
        json.dumps(
            {
                "first_s": first_s,
                "first_cpu_s": first_cpu_s,
                "step_s": min(steps_s[1:]),
                "peak_bytes": peak_memory_bytes(),
                "runner_bytes": getattr(device, "runner", None)
                and device.runner.peak_memory_bytes,
                "loss": update.report.loss,
                "gradient": float(np.sqrt(np.square(gradients.astype(float)).sum())),
            }
        )
    )


if __name__ == "__main__":
    main()
