"""A device with programs sends what a device with PyTorch sends."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from lola_flwr.device.block_device import BlockDevice
from lola_flwr.device.contract import OutOfMemory
from lola_flwr.errors import UserError
from lola_flwr.export import device as exported_device
from lola_flwr.export.device import ExportedDevice
from lola_flwr.system.devices import simulated_device
from lola_flwr.wire.held_versions import HeldVersions
from lola_flwr.wire.packing import GRADIENTS, VALUES, pack
from lola_flwr.wire.records import Assignment, PartTask
from lola_flwr.wire.versions import Versions, model_pieces
from tests.export.small import TorchRunner, copied

PROFILE = simulated_device(0, seed=2)


@pytest.fixture
def devices(batch, tmp_path):
    """Return a device with programs, one with PyTorch, and their model's values."""
    of, manifest = copied(tmp_path / "steps")
    parameters = dict(of.model.named_parameters())
    values = {n: parameters[n].detach().numpy() + 0.01 for n in of.partition.trainable}
    drawn = {name: tensor[:5, ...] for name, tensor in batch.items()}

    def simulated(_):
        return 1.5

    with_programs = ExportedDevice(
        profile=PROFILE,
        manifest=manifest,
        runner=TorchRunner(of, manifest),
        batch_source=lambda *_: {n: t.numpy() for n, t in drawn.items()},
        store=tmp_path / "programs",
        simulated_compute_s=simulated,
    )
    with_torch = BlockDevice(
        profile=PROFILE,
        load_model=lambda: (of.model, of.partition),
        batch_source=lambda *_: drawn,
        store=tmp_path / "torch",
        simulated_compute_s=simulated,
    )
    return with_programs, with_torch, values


def assignment(device, **options):
    given = {
        "server_round": 1,
        "block_index": 1,
        "share": 0.5,
        "batch_size": 6,
        "codec": "fp32",
        "base_fingerprint": device.manifest.base_fingerprint,
    }
    return Assignment(**{**given, **options})


def alike(first, second):
    assert first.report == second.report or (
        first.report.loss == pytest.approx(second.report.loss, rel=1e-6)
        and replace(first.report, loss=0.0) == replace(second.report, loss=0.0)
    )
    assert first.num_examples == second.num_examples
    assert first.arrays.keys() == second.arrays.keys()
    for name, array in first.arrays.items():
        other = second.arrays[name]
        assert (array.dtype, array.shape) == (other.dtype, other.shape)
        np.testing.assert_allclose(
            array.astype(float), other.astype(float), rtol=1e-4, atol=2e-7
        )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"block_index": 2, "sends_head": False},
        {"block_index": 0, "codec": "bf16"},
        {"codec": "topk:0.1"},
        {"projection_rank": 2, "projection_period": 5, "projection_seed": 1},
    ],
)
def test_its_update_is_that_of_a_device_with_pytorch(devices, options):
    with_programs, with_torch, values = devices
    asked = assignment(with_programs, **options)
    for number in (1, 2):  # what a codec left out comes with the next
        asked = replace(asked, server_round=number)
        alike(
            with_programs.train(asked, {VALUES: pack(values)}),
            with_torch.train(asked, {VALUES: pack(values)}),
        )


def test_it_completes_what_a_message_leaves_out(devices):
    with_programs, with_torch, values = devices
    partition, names = with_programs.manifest.partition, list(values)
    version = Versions(model_pieces(partition, names)).of([*values.values()])
    held = HeldVersions()
    whole = held.manifest("d", version)
    asked = assignment(with_programs, manifest=whole.to_text())
    update = with_programs.train(asked, {VALUES: pack(values)})
    alike(update, with_torch.train(asked, {VALUES: pack(values)}))
    assert update.report.held == whole.version
    nothing = held.acknowledged("d", whole, update.report.held).manifest("d", version)
    asked = replace(asked, manifest=nothing.to_text())
    again = with_programs.train(asked, {})
    np.testing.assert_array_equal(again.arrays[GRADIENTS], update.arrays[GRADIENTS])
    forgot = replace(with_programs, store=with_programs.store / "other")
    assert forgot.train(asked, {}).report.update_kind == "nothing"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"base_fingerprint": "0" * 64}, "frozen base weights"),
        ({"block_index": 7}, "No program trains block 7"),
        ({"direction_seed": 3}, "zeroth-order"),
        ({"operations": "fff"}, "schedule of operations"),
        ({"further_blocks": "2"}, "several blocks"),
        ({"update_names": "a"}, "return weights"),
    ],
)
def test_what_programs_do_not_do_is_refused(devices, options, said):
    with_programs, _, values = devices
    with pytest.raises(UserError, match=said):
        with_programs.train(assignment(with_programs, **options), values)


def test_values_of_another_model_are_refused(devices):
    with_programs, _, values = devices
    asked = assignment(with_programs)
    first = next(iter(values))
    fewer = {n: v for n, v in values.items() if n != first}
    for other in (
        {VALUES: pack(values)[1:]},
        {VALUES: pack(values).astype(np.float64)},
        fewer,
        {**values, first: values[first][:-1]},
        {**values, first: values[first].astype(int)},
    ):
        with pytest.raises(UserError, match=r"same model|different models"):
            with_programs.train(asked, other)


def test_parts_of_a_spread_model_are_refused(devices):
    task = PartTask(kind="return", step=1, base_fingerprint="", seed=0, num_groups=1)
    with pytest.raises(UserError, match="devices with PyTorch for D2FT"):
        devices[0].compute_part(task, {})


def test_it_says_for_which_batches_its_programs_are_made(devices):
    said = devices[0].profile.to_properties()
    assert (said["trains-one-block"], said["batch-size"]) == (True, 6)


def test_a_batch_without_labels_is_refused(devices):
    nothing = replace(devices[0], batch_weight=lambda _: 0)
    with pytest.raises(UserError, match="mean over nothing"):
        nothing.train(assignment(nothing), devices[2])


def test_a_device_that_is_not_simulated_measures(devices, monkeypatch):
    with_programs, _, values = devices
    measured = replace(with_programs, simulated_compute_s=None)
    report = measured.train(assignment(measured), values).report
    assert (report.compute_clock, report.peak_memory_bytes) == ("measured", 123.0)
    monkeypatch.setattr(exported_device, "available_memory_bytes", lambda: 1.0)
    with pytest.raises(OutOfMemory, match="block 1 needs"):
        measured.train(assignment(measured), values)


def test_it_needs_no_pytorch():
    program = (
        "import sys; from lola_flwr.export import device, runner; "
        "assert not {'torch', 'transformers', 'flwr'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-P", "-c", program], check=True)
