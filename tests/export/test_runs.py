"""Runs with devices that have programs reach the losses of devices with PyTorch."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from flwr.supercore.task_identity import TaskIdentity

from lola_flwr.clients import BlockDevice, LoLaClient
from lola_flwr.export.bindings import BindingsRunner
from lola_flwr.export.device import ExportedDevice
from lola_flwr.export.runner import NativeRunner
from lola_flwr.strategies.message import LoLaDeft
from lola_flwr.system.devices import simulated_device
from simulations.benchmarks import native_runner
from tests.export.programs import built_runner, programs
from tests.flat_settings import coordinator_of
from tests.strategies.in_process import InProcessGrid

pytestmark = pytest.mark.slow
pytest.importorskip("executorch", reason="needs the extra [export]")

ROUNDS, DEVICES = 10, 4


@pytest.fixture(autouse=True)
def task(monkeypatch):
    """Flower makes messages only within a task."""
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def drawn(manifest, device, server_round):
    """Draw a device's batch, the same ever again; now and then without its last."""
    rng = np.random.default_rng(device)
    rows, columns = 6 - server_round % 2, 10 - device
    return {
        "input_ids": rng.integers(5, 60, (6, columns))[:rows],
        "attention_mask": np.ones((rows, columns), np.int64),
        "labels": np.arange(rows) % 2,
    }


def device_of(kind, index, of, manifest, runner):
    profile = simulated_device(index, seed=2)

    def draw(server_round, _):
        return drawn(manifest, index, server_round)

    def simulated(_):
        return 1.0

    if kind == "program":
        return ExportedDevice(
            profile=profile,
            manifest=manifest,
            runner=runner,
            batch_source=draw,
            simulated_compute_s=simulated,
        )
    model = copy.deepcopy(of.model)
    return BlockDevice(
        profile=profile,
        load_model=lambda: (model, of.partition),
        batch_source=lambda *given: {
            name: torch.from_numpy(array) for name, array in draw(*given).items()
        },
        simulated_compute_s=simulated,
    )


def run(kinds, of, manifest, runner):
    """Run rounds with these devices; return the losses of the rounds."""
    parameters = dict(of.model.named_parameters())
    values = {n: parameters[n].detach().numpy().copy() for n in of.partition.trainable}
    coordinator = coordinator_of(
        of.partition,
        values,
        of.costs,
        bandwidth_hz=1e6,
        lr=1e-2,
        base_fingerprint=manifest.base_fingerprint,
        batch_size=6,
    )
    devices = [device_of(k, i, of, manifest, runner) for i, k in enumerate(kinds)]
    apps = {100 + i: LoLaClient(lambda _, d=d: d) for i, d in enumerate(devices)}
    records = []
    strategy = LoLaDeft(coordinator, on_round=records.append)
    grid = InProcessGrid(apps)
    result = strategy.start(grid, strategy.initial_arrays(), ROUNDS)
    assert {b.status for record in records for b in record.blocks} == {"accepted"}
    losses = [m["train_loss"] for m in result.train_metrics_clientapp.values()]
    assert len(losses) == ROUNDS
    return losses


@pytest.mark.parametrize("backend", ["native", "bindings"])
def test_ten_rounds_reach_the_same_losses(backend):
    of, directory, manifest = programs("roberta")
    expected = run(["torch"] * DEVICES, of, manifest, None)
    assert np.mean(expected[-3:]) < np.mean(expected[:3])
    if backend == "native":
        runner = NativeRunner(built_runner(), directory, manifest)
    else:
        runner = BindingsRunner(directory, manifest)
    for kinds in (["program"] * DEVICES, ["program", "torch"] * (DEVICES // 2)):
        losses = run(kinds, of, manifest, runner)
        np.testing.assert_allclose(losses, expected, rtol=1e-4)
    if backend == "native":
        runner.close()


def test_why_not_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(native_runner, "find_spec", lambda _: None)
    assert native_runner.why_not() == "needs the extra [export]"
    monkeypatch.undo()
    monkeypatch.setattr(native_runner.shutil, "which", lambda _: None)
    assert native_runner.why_not() == "needs cmake"
