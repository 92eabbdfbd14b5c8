"""``lola-flwr plan``."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from lola_flwr.allocation import ALLOCATORS, ENERGY_ALLOCATORS, allocate
from lola_flwr.cli.main import main
from lola_flwr.costs.of_model import model_costs
from lola_flwr.costs.shapes import KNOWN_MODELS, model_shapes
from lola_flwr.model.adapter_blocks import model_partition
from lola_flwr.model.loading import load_classifier
from lola_flwr.model.sources import RANDOM_SHAPES
from lola_flwr.planning import named_model_costs, round_problem
from lola_flwr.system.devices import FleetRanges
from lola_flwr.system.fleet_file import fleet_toml, generate_fleet
from tests.marks import rest_slow


def planned(capsys, *arguments):
    assert main(["plan", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_is_the_allocation(capsys):
    shown = planned(capsys, "--devices", "14", "--seed", "3", "--batch-size", "8")
    problem = round_problem(
        generate_fleet(14, seed=3),
        named_model_costs("roberta-base", batch_size=8),
        seed=3,
    )
    best = allocate(problem)
    assert shown["round_s"] == best.round_s
    assert [part["block"] for part in shown["blocks"]] == list(range(12))
    assert [int(part["device"][-4:]) for part in shown["blocks"]] == (
        best.device_of_block.tolist()
    )
    assert sum(part["share"] for part in shown["blocks"]) == pytest.approx(1)
    for part in shown["blocks"]:
        assert part["compute_s"] + part["upload_s"] == pytest.approx(part["total_s"])
        assert part["required_memory_bytes"] <= part["memory_bytes"]
    assert {row["allocator"] for row in shown["allocators"]} == set(ALLOCATORS)


def test_table_shows_every_active_device_and_allocator(capsys):
    assert main(["plan", "--model", "minilm-l6", "--allocator", "crunch"]) == 0
    shown = capsys.readouterr().out
    assert "6 of 20 devices train 6 blocks" in shown
    assert "(crunch)" in shown
    assert all(name in shown for name in ALLOCATORS)


def test_joules_are_shown_where_devices_say_what_they_draw(capsys, tmp_path):
    fleet = generate_fleet(8, seed=1, ranges=FleetRanges().with_powers())
    file = tmp_path / "fleet.toml"
    file.write_text(fleet_toml(fleet))
    arguments = ["--fleet", str(file), "--model", "minilm-l6", "--energy-slack", "0.3"]
    shown = planned(capsys, *arguments, "--allocator", "energy")
    parts, rows = shown["blocks"], {r["allocator"]: r for r in shown["allocators"]}
    assert {*rows} == {*ALLOCATORS, *ENERGY_ALLOCATORS}
    powers = {device.name: device for device in fleet}
    for part in parts:
        device = powers[part["device"]]
        assert part["joules"] == pytest.approx(
            device.compute_power_w * part["compute_s"]
            + device.transmit_power_w * part["upload_s"]
        )
    least_j = sum(part["joules"] for part in parts)
    assert rows["energy"]["joules"] == pytest.approx(least_j)
    assert least_j < rows["exact"]["joules"]
    worst_j = rows["energy-worst"]["worst_device_j"]
    assert worst_j < max(part["joules"] for part in parts)
    for name in ENERGY_ALLOCATORS:
        assert rows[name]["round_s"] <= 1.3 * rows["exact"]["round_s"] * (1 + 1e-9)
    assert main(["plan", *arguments]) == 0
    said = capsys.readouterr().out
    assert "worst device" in said and " J" in said


@pytest.mark.slow
def test_joules_of_batches_that_are_chosen_are_those_of_the_devices(capsys, tmp_path):
    fleet = generate_fleet(8, seed=1, ranges=FleetRanges().with_powers())
    (tmp_path / "fleet.toml").write_text(fleet_toml(fleet))
    arguments = ["--fleet", str(tmp_path / "fleet.toml"), "--model", "minilm-l6"]
    shown = planned(capsys, *arguments, "--batch-size", "auto")
    joules = [part["joules"] for part in shown["blocks"]]
    (row,) = shown["allocators"]
    assert row["joules"] == pytest.approx(sum(joules))
    assert row["worst_device_j"] == max(joules)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--allocator", "energy"], "State compute-power-w and transmit-power-w"),
        (
            ["--allocator", "energy-worst", "--batch-size", "auto"],
            "--batch-size=auto chooses for time, and --allocator=energy-worst for ene",
        ),
    ],
)
def test_energy_allocators_say_what_they_lack(capsys, arguments, says):
    assert main(["plan", "--devices", "8", "--model", "minilm-l6", *arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


def test_without_fading_the_round_does_not_matter(capsys):
    one, two = (
        planned(capsys, "--fading", "none", "--round", number)["round_s"]
        for number in "12"
    )
    assert one == two
    assert planned(capsys)["round_s"] != planned(capsys, "--round", "2")["round_s"]


def test_a_plan_is_the_round_of_a_fleet_file(capsys, tmp_path):
    path = str(tmp_path / "fleet.toml")
    assert main(["fleet", "generate", "20", "--out", path]) == 0
    capsys.readouterr()
    assert planned(capsys, "--fleet", path)["blocks"] == planned(capsys)["blocks"]


def test_planning_needs_neither_torch_nor_flower():
    program = (
        "import sys\nfrom lola_flwr.cli.main import main\n"
        "assert main(['plan', '--devices', '20']) == 0\n"
        "heavy = {'torch', 'flwr', 'transformers', 'ray'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("roberta-base", RobertaConfig(**RANDOM_SHAPES["random:roberta-base"])),
        ("minilm-l6", None),
    ],
)
def test_known_shapes_are_those_of_the_model(name, config):
    if config is None:
        loaded, _ = load_classifier(name, num_labels=2)
    else:
        with torch.device("meta"):
            loaded = RobertaForSequenceClassification(config)
    known = model_shapes(name)
    assert dict(known.shapes) == {
        name: tuple(values.shape) for name, values in loaded.named_parameters()
    }
    assert known.dropout_heads == loaded.config.num_attention_heads


@pytest.mark.parametrize("named", rest_slow([["BertModel"], [], ["BertForMaskedLM"]]))
def test_an_encoder_is_planned_as_the_classifier_that_it_becomes(tmp_path, named):
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 3}
    config = AutoConfig.for_model(
        "bert", **sizes, intermediate_size=16, vocab_size=50, architectures=named
    )
    config.save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_config(config)
    sizes = {"batch_size": 2, "sequence_length": 4}
    expected = model_costs(model, model_partition(model), **sizes)
    costs = named_model_costs(str(tmp_path), **sizes)
    np.testing.assert_array_equal(costs.flops, expected.flops)
    np.testing.assert_array_equal(costs.memory_bytes, expected.memory_bytes)


@pytest.mark.parametrize("model", KNOWN_MODELS)
def test_depth_costs_more(model):
    costs = named_model_costs(model)
    assert np.all(np.diff(costs.flops) < 0)
    assert np.all(np.diff(costs.memory_bytes) < 0)


@pytest.fixture
def llama(tmp_path):
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        num_hidden_layers=3,
        vocab_size=60,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_any_other_configuration_is_counted(capsys, llama):
    shown = planned(capsys, "--model", str(llama), "--max-length", "8")
    assert shown["num_blocks"] == 3
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(llama))
    sizes = {"batch_size": 32, "sequence_length": 8}
    expected = model_costs(model, model_partition(model), **sizes)
    for path in (llama, llama / "config.json"):
        costs = named_model_costs(str(path), **sizes)
        np.testing.assert_array_equal(costs.flops, expected.flops)
        np.testing.assert_array_equal(costs.memory_bytes, expected.memory_bytes)


def test_what_cannot_be_planned_is_said(capsys, llama, tmp_path):
    path = llama / "config.json"
    config = json.loads(path.read_text())
    assert main(["plan", "--model", str(llama), "--stack", "layers"]) != 0
    assert "model.layers" in capsys.readouterr().err
    quantised = {
        "quantization_config": {"load_in_4bit": True, "quant_method": "bitsandbytes"}
    }
    path.write_text(json.dumps({**config, **quantised}))
    assert main(["plan", "--model", str(llama)]) != 0
    assert "weights are quantised: load it" in capsys.readouterr().err
    path.write_text(json.dumps({"model_type": "no such family"}))
    assert main(["plan", "--model", str(llama)]) != 0
    said = capsys.readouterr().err
    assert "cannot be counted" in said
    assert len(said.strip().splitlines()) == 1


def test_a_trace_takes_the_place_of_snr_and_fading(capsys, tmp_path):
    fleet = generate_fleet(6, seed=3)
    rates = [1.5, 2.25, 3.0, 0.8, 4.0, 1.1]
    lines = [f"0,{d.name},{r}" for d, r in zip(fleet, rates, strict=True)]
    trace, links = tmp_path / "links.csv", tmp_path / "fleet.toml"
    trace.write_text("\n".join(["time_s,device,mbit_s", *lines]))
    linked = [replace(d, uplink_bps=1e6 * r) for d, r in zip(fleet, rates, strict=True)]
    links.write_text(fleet_toml(linked))
    model = ("--model", "minilm-l6")
    drawn = ("--devices", "6", "--seed", "3", *model)
    traced = planned(capsys, *drawn, "--channel", str(trace))
    known = planned(capsys, "--fleet", str(links), *model)
    assert (traced["round_s"], traced["blocks"]) == (known["round_s"], known["blocks"])
    assert main(["plan", *drawn, "--channel", "fast"]) == 1
    assert "channel='fast' must be" in capsys.readouterr().err


def test_a_power_limited_plan_has_the_allocators_that_know_it(capsys):
    arguments = ("--devices", "8", "--model", "minilm-l6", "--uplink", "power-limited")
    shown = planned(capsys, *arguments)
    assert {row["allocator"] for row in shown["allocators"]} == (
        set(ALLOCATORS) - {"jbba"}
    )
    assert shown["round_s"] < planned(capsys, *arguments[:-2])["round_s"]
    assert main(["plan", *arguments, "--allocator", "jbba"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "allocator='jbba' takes devices to send with uniform power" in line


def test_a_plan_in_turn_says_how_long_devices_wait_for_it(capsys):
    arguments = ("--devices", "8", "--model", "minilm-l6", "--uplink", "tdma")
    shown = planned(capsys, *arguments)
    assert {row["allocator"] for row in shown["allocators"]} == (
        {"exact", "random", "greedy"}
    )
    assert shown["round_s"] <= planned(capsys, *arguments[:-2])["round_s"]
    ends_s = sorted(part["total_s"] for part in shown["blocks"])
    for part in shown["blocks"]:
        spent_s = part["compute_s"] + part["turn_s"] + part["upload_s"]
        assert part["total_s"] == pytest.approx(spent_s)
        began_s = part["total_s"] - part["upload_s"]
        assert not any(began_s + 1e-9 < end < part["total_s"] - 1e-9 for end in ends_s)
    assert main(["plan", *arguments]) == 0
    assert "exact" in capsys.readouterr().out
    assert main(["plan", *arguments, "--allocator", "crunch"]) == 1
    assert "allocator='crunch': that is for devices" in capsys.readouterr().err


def test_devices_that_move_have_another_snr(capsys):
    arguments = ("--devices", "8", "--model", "minilm-l6", "--fading", "none")
    still = planned(capsys, *arguments)["round_s"]
    assert planned(capsys, *arguments, "--mobility", "exponent=0")["round_s"] == still
    assert planned(capsys, *arguments, "--mobility", "exponent=3.5")["round_s"] != still


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--uplink", "cdma"], "uplink='cdma' must be one of ofdma, power-limited"),
        (["--fading", "rician"], "fading='rician' must be one of rayleigh, none, gaus"),
        (["--fading", "gauss-markov", "--coherence-s", "0"], "coherence_s=0.0 must be"),
        (["--mobility", "spd=1"], "mobility has no 'spd'; it has speed_m_s, cell_m, e"),
        (["--mobility", "fast"], "Write options as 'a=1, b=[2, 3]'"),
        (
            ["--fading", "none", "--channel", "math:prod"],
            "(own_rates) says what links c",
        ),
    ],
)
def test_channels_that_there_are_not_are_refused(capsys, arguments, says):
    assert main(["plan", "--devices", "8", "--model", "minilm-l6", *arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


def test_batches_are_chosen_for_each_device(capsys):
    arguments = ["--devices", "8", "--model", "minilm-l6", "--seed", "1"]
    fixed = planned(capsys, *arguments)
    assert not any("batch_size" in part for part in fixed["blocks"])
    shown = planned(capsys, *arguments, "--batch-size", "auto")
    sizes = [part["batch_size"] for part in shown["blocks"]]
    # These devices do not say how many examples they hold.
    assert all(1 <= size <= 32 for size in sizes)
    assert main(["plan", *arguments, "--batch-size", "auto"]) == 0
    table = capsys.readouterr().out
    assert "batch" in table
    assert "Allocators" not in table


@pytest.mark.parametrize("size", ["0", "many", "2.5"])
def test_a_batch_is_a_whole_number_or_auto(capsys, size):
    assert main(["plan", "--batch-size", size]) == 1
    error = capsys.readouterr().err
    assert f"--batch-size={size} must be a whole number, at least 1, or auto" in error
