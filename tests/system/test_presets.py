"""Devices that people own: their figures, and fleets of them."""

from __future__ import annotations

import json

import pytest

from lola_flwr.app.profiles import simulated_profile
from lola_flwr.cli.main import main
from lola_flwr.errors import UserError
from lola_flwr.system.fleet_file import (
    fleet_toml,
    from_anywhere,
    generate_fleet,
    parse_fleet,
    read_fleet,
)
from lola_flwr.system.presets import presets
from lola_glue.config import GlueConfig
from simulations.figures.learning import app_config


def test_speeds_follow_from_the_makers_figures():
    known = presets()
    # What the makers state themselves.
    assert known["jetson-agx-orin"].peak_flops_per_s == pytest.approx(5.3e12, rel=0.01)
    assert known["jetson-nano"].peak_flops_per_s == pytest.approx(472e9 / 2, rel=0.01)
    for preset in known.values():
        assert preset.flops_per_s == pytest.approx(0.3 * preset.peak_flops_per_s)
        assert preset.memory_bytes == preset.installed_bytes / 2


@pytest.mark.parametrize("name", presets())
def test_every_preset_is_a_device_with_its_sources(name):
    (device,) = read_fleet(name)
    assert device.uplink_bps == presets()[name].uplink_bps
    for source in ("speed_source", "memory_source", "uplink_source"):
        assert len(getattr(presets()[name], source)) > 10
    preset = presets()[name]
    assert device.compute_power_w == preset.compute_power_w
    assert (preset.compute_power_w is None) == (preset.power_source == "")
    # Of none is it published.
    assert device.transmit_power_w is None


def test_a_fleet_of_presets_is_planned(capsys):
    fleet = "jetson-orin-nano:4,raspberry-pi-5:8"
    assert main(["plan", "--fleet", fleet, "--json"]) == 0
    blocks = json.loads(capsys.readouterr().out)["blocks"]
    assert {block["device"] for block in blocks} == {
        *(f"jetson-orin-nano-{number}" for number in range(1, 5)),
        *(f"raspberry-pi-5-{number}" for number in range(1, 9)),
    }


def test_presets_can_be_completed_in_a_file(capsys):
    assert main(["fleet", "show", "jetson-nano:2,laptop", "--toml"]) == 0
    text = capsys.readouterr().out
    assert parse_fleet(text) == read_fleet("jetson-nano:2,laptop")


def test_names_sort_as_numbers():
    names = [device.name for device in read_fleet("raspberry-pi-4:12, laptop")]
    assert names[:12] == sorted(names[:12])
    assert names[8:] == [*(f"raspberry-pi-4-{n:02d}" for n in range(9, 13)), "laptop-1"]


def test_a_simulation_has_them():
    fleet = "laptop:2,phone-high-end"
    config = GlueConfig.from_run_config({**app_config(), "fleet": fleet})
    profiles = [simulated_profile(config, index) for index in range(3)]
    assert tuple(profiles) == read_fleet(fleet)
    with pytest.raises(UserError, match="has 3 devices"):
        simulated_profile(config, 3)


def test_a_file_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "laptop:2").write_text(fleet_toml(generate_fleet(1)))
    assert read_fleet("laptop:2") == generate_fleet(1)
    assert from_anywhere((tmp_path / "laptop:2").relative_to(tmp_path)) == str(
        tmp_path / "laptop:2"
    )


@pytest.mark.parametrize(
    ("fleet", "message"),
    [
        ("jetson-orin-nao:3", "Did you mean 'jetson-orin-nano'?"),
        ("jetson-orin-nao", "Did you mean 'jetson-orin-nano'?"),
        ("toaster:3", "jetson-nano, jetson-orin-nano, "),
        ("laptop:0", "from 1 to 999999"),
        ("laptop:-1", "from 1 to 999999"),
        ("laptop:²", "from 1 to 999999"),
        ("laptop:", "from 1 to 999999"),
        ("laptop:1000000", "from 1 to 999999"),
        ("laptop:1:2", "from 1 to 999999"),
        ("laptop,laptop:2", "has laptop twice"),
        ("laptop,", "'' in the fleet"),
    ],
)
def test_mistakes(fleet, message, capsys):
    assert main(["plan", "--fleet", fleet]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_presets_are_shown_with_their_sources(capsys):
    assert main(["fleet", "presets"]) == 0
    shown = capsys.readouterr().out
    for preset in presets().values():
        assert preset.name in shown
        assert preset.speed_source in shown
    assert "not measured" in shown
    assert main(["fleet", "presets", "--json"]) == 0
    assert [p["name"] for p in json.loads(capsys.readouterr().out)] == list(presets())
