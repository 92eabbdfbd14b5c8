"""Fleet files, and the command that makes, shows and checks them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lola_flwr.cli.main import main
from lola_flwr.errors import UserError
from lola_flwr.system.devices import DeviceProfile
from lola_flwr.system.fleet_file import (
    fleet_toml,
    generate_fleet,
    parse_fleet,
    read_fleet,
)

PROFILES = st.builds(
    DeviceProfile,
    name=st.text(min_size=1, max_size=64).filter(str.isprintable),
    flops_per_s=st.floats(1e5, 1e16),
    memory_bytes=st.floats(1e5, 1e13),
    snr_db=st.floats(-60, 80),
    uplink_bps=st.none() | st.floats(1e3, 1e12),
    splits_batch=st.booleans(),
    recomputes_suffix=st.booleans(),
    compute_power_w=st.none() | st.floats(0, 1e4),
    transmit_power_w=st.none() | st.floats(0, 1e4),
)


@given(st.lists(PROFILES, min_size=1, max_size=4, unique_by=lambda d: d.name))
def test_a_fleet_file_gives_the_fleet_back(devices):
    assert parse_fleet(fleet_toml(devices)) == tuple(devices)


@given(st.text(max_size=60))
def test_any_text_is_a_fleet_or_a_line(text):
    try:
        parse_fleet(text)
    except UserError as error:
        assert str(error)


def test_a_fleet_is_the_same_in_any_size():
    assert generate_fleet(3, seed=4) == generate_fleet(9, seed=4)[:3]


def test_generate_show_validate(tmp_path, capsys):
    path = str(tmp_path / "fleet.toml")
    assert main(["fleet", "generate", "5", "--seed", "2", "--out", path]) == 0
    assert main(["fleet", "validate", path]) == 0
    assert "5 devices" in capsys.readouterr().out
    assert main(["fleet", "show", path]) == 0
    assert "device-0004" in capsys.readouterr().out
    assert main(["fleet", "show", path, "--json"]) == 0
    shown = [
        DeviceProfile.from_properties(device)
        for device in json.loads(capsys.readouterr().out)
    ]
    assert tuple(shown) == generate_fleet(5, seed=2)


def test_a_fleet_that_says_what_it_draws_is_the_same_otherwise(tmp_path, capsys):
    path = tmp_path / "fleet.toml"
    command = ["fleet", "generate", "5", "--seed", "2", "--power", "--out", str(path)]
    assert main(command) == 0
    told, plain = read_fleet(path), generate_fleet(5, seed=2)
    unsaid = {"compute_power_w": None, "transmit_power_w": None}
    assert tuple(replace(device, **unsaid) for device in told) == plain
    by_speed = sorted(told, key=lambda device: device.flops_per_s)
    powers = [device.compute_power_w for device in by_speed]
    assert powers == sorted(powers)
    assert powers[0] >= 5 and powers[-1] <= 15
    sending = [device.transmit_power_w for device in told]
    assert 1.288 <= min(sending) < max(sending) <= 3.76
    capsys.readouterr()
    assert main(["fleet", "show", str(path)]) == 0
    assert "sends at" in capsys.readouterr().out


def test_a_name_is_no_markup(tmp_path, capsys):
    path = tmp_path / "fleet.toml"
    text = fleet_toml(generate_fleet(6)).replace("device-0004", "[/bold]x[red]")
    path.write_text(text)
    assert main(["fleet", "show", str(path)]) == 0
    assert "[/bold]x[red]" in capsys.readouterr().out
    assert main(["plan", "--fleet", str(path), "--model", "minilm-l6"]) == 0
    assert "[/bold]x[red]" in capsys.readouterr().out


def test_generate_without_a_file_prints_one(capsys):
    assert main(["fleet", "generate", "3"]) == 0
    assert parse_fleet(capsys.readouterr().out) == generate_fleet(3)


def test_a_file_is_not_overwritten(tmp_path, capsys):
    path = tmp_path / "fleet.toml"
    path.write_text("mine")
    assert main(["fleet", "generate", "3", "--out", str(path)]) == 1
    assert path.read_text() == "mine"
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[device]\n", "no TOML"),
        ("", "no device"),
        ("device = 3\n", "no device"),
        ("device = [3]\n", "Device 1 is no table"),
        ("[[devices]]\n", "Did you mean 'device'?"),
        ('[[device]]\nname = "a"\nflops = 2e11\n', "Did you mean 'flops-per-s'?"),
        ('[[device]]\nname = "a"\nflops-per-s = 2e11\n', "lacks memory-bytes, snr-db"),
        (fleet_toml(generate_fleet(1)) * 2, "'device-0000' is that of 2 devices"),
        (
            fleet_toml(generate_fleet(1)).replace("snr-db = ", "snr-db = 9"),
            "must be a number from -60 to 80",
        ),
    ],
)
def test_mistakes_in_a_file(text, message):
    with pytest.raises(UserError) as raised:
        parse_fleet(text)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
