from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lola_flwr.cli.main import main
from lola_flwr.clients import node_profile
from lola_flwr.deployment import host, measurement
from lola_flwr.deployment.measurement import (
    chosen_depths,
    measure_device,
    read_profile,
    write_profile,
)
from lola_flwr.errors import UserError
from lola_flwr.machine.memory import available_memory_bytes
from lola_flwr.machine.power import measured_energy, module_supplies
from lola_flwr.system.devices import DeviceProfile, InvalidProfile
from tests.machine.test_power import ORIN_NANO, monitor


@pytest.fixture(scope="module")
def measured():
    seen = []
    measurement = measure_device(
        "random:roberta-tiny",
        name="board",
        batch_size=2,
        sequence_length=8,
        torch_device="cpu",
        uplink_bps=2e6,
        progress=lambda step, done, total: seen.append((step, done, total)),
    )
    assert seen[0][0] == "loading random:roberta-tiny"
    assert seen[-1] == ("done", 4, 4)
    return measurement


def test_every_depth_is_measured_and_gives_the_speed(measured):
    assert [step.depth for step in measured.depths] == [1, 2, 3, 4]
    assert all(step.compute_s > 0 for step in measured.depths)
    assert np.all(np.diff([step.flops for step in measured.depths]) > 0)
    speeds = [step.flops / step.compute_s for step in measured.depths]
    assert measured.flops_per_s == np.median(speeds)
    assert 0 < measured.memory_bytes < available_memory_bytes() * 2


def test_the_file_is_the_profile_that_a_node_reports(measured, tmp_path):
    path = tmp_path / "device.json"
    write_profile(measured, path)
    assert [p.name for p in tmp_path.iterdir()] == ["device.json"]

    def profile(**stated):
        config = {"profile": str(path), **stated}
        return node_profile(
            SimpleNamespace(node_id=3, node_config=config, run_config={})
        )

    assert profile() == measured.profile
    assert profile().uplink_bps == 2e6
    assert profile(name="other", **{"uplink-bps": 5e5}).uplink_bps == 5e5


def test_what_sensors_said_is_in_the_file(measured, tmp_path):
    path = tmp_path / "device.json"
    assert measured.compute_power_w is None  # no board
    write_profile(replace(measured, compute_power_w=7.5), path)
    config = {"profile": str(path), "transmit-power-w": 1.3}
    profile = node_profile(
        SimpleNamespace(node_id=3, node_config=config, run_config={})
    )
    assert (profile.compute_power_w, profile.transmit_power_w) == (7.5, 1.3)


@pytest.mark.slow
def test_a_board_is_measured_by_its_sensors(monkeypatch, tmp_path):
    monitor(tmp_path / "drivers", "1-0040", ORIN_NANO)
    supplies = module_supplies(tmp_path / "drivers")
    monkeypatch.setattr(
        measurement, "measured_energy", lambda: measured_energy(supplies)
    )
    found = measure_device("random:roberta-tiny", batch_size=2, sequence_length=8)
    assert found.compute_power_w == pytest.approx(8.0)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (None, "No such file"),
        ("{", "is no JSON"),
        ("[]", "is no profile of version 1"),
        ('{"lola-flwr-profile": 2}', "is no profile of version 1"),
    ],
)
def test_a_file_that_is_none_is_named(tmp_path, text, complaint):
    path = tmp_path / "device.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=complaint):
        read_profile(path)


def test_an_edited_profile_is_checked(measured, tmp_path):
    path = tmp_path / "device.json"
    path.write_text(
        json.dumps({**json.loads(measured.to_json()), "flops-per-s": float("inf")})
    )
    context = SimpleNamespace(
        node_id=3, node_config={"profile": str(path)}, run_config={}
    )
    with pytest.raises(InvalidProfile, match="flops_per_s=inf"):
        node_profile(context)


@given(
    num_blocks=st.integers(1, 200),
    depth_s=st.floats(1e-3, 1e3),
    budget_s=st.floats(1, 1e3),
)
def test_the_first_and_the_last_depth_are_always_measured(
    num_blocks, depth_s, budget_s
):
    depths = list(chosen_depths(num_blocks, depth_s, budget_s))
    assert depths == sorted(set(depths))
    assert (depths[0], depths[-1]) == (1, num_blocks)
    assert len(depths) <= max(2, budget_s / depth_s)


def test_a_link_or_an_snr_must_be_known():
    figures = {"name": "a", "flops-per-s": 1e9, "memory-bytes": 1e9}
    assert DeviceProfile.from_properties({**figures, "uplink-bps": 1e6}).snr_db == 0
    with pytest.raises(InvalidProfile, match="snr-db"):
        DeviceProfile.from_properties(figures)


def test_power_modes_and_jetsons(tmp_path):
    assert host.parse_power_mode("NV Power Mode: MAXN_SUPER\n2\n") == "MAXN_SUPER"
    assert host.parse_power_mode("no such thing\n") is None
    model = tmp_path / "model"
    model.write_bytes(b"NVIDIA Jetson Orin Nano Developer Kit\0")
    assert host.jetson_model(model) == "NVIDIA Jetson Orin Nano Developer Kit"
    model.write_bytes(b"Raspberry Pi 5 Model B\0")
    assert host.jetson_model(model) is None
    assert host.jetson_model(tmp_path / "none") is None


@pytest.mark.slow
def test_the_command_writes_a_file(tmp_path, capsys):
    out = tmp_path / "device.json"
    options = ["--model", "random:roberta-tiny", "--batch-size", "2"]
    options += ["--max-length", "8", "--torch-device", "cpu", "--uplink-mbps", "2"]
    assert main(["profile", *options, "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(out.read_text())
    assert read_profile(out)["uplink-bps"] == 2e6
    assert main(["profile", *options, "--out", str(out)]) == 0
    assert "flop/s" in capsys.readouterr().out
    assert main(["profile", "--model", "random:nowhere", "--out", str(out)]) == 1
    assert main(["profile", "--torch-device", "cuda:7", "--out", str(out)]) == 1
    # Of RoBERTa's 130 positions the first, up to the padding's, are no token's.
    too_long = [*options, "--max-length", "130"]
    assert main(["profile", *too_long, "--out", str(out)]) == 1
    assert "max-length=130 exceeds the 129 positions" in capsys.readouterr().err
