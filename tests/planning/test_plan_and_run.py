"""`lola-flwr plan` says what round 1 of a run with the same seed does."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from lola_flwr.allocation import ALLOCATORS
from lola_flwr.build import (
    AllocationOptions,
    Channel,
    RoundSettings,
    Transfer,
    coordinator_for,
    model_costs,
)
from lola_flwr.cli.main import main
from lola_flwr.model.blocks import partition_parameters
from lola_flwr.planning import named_model_costs, plan_rounds
from lola_flwr.system.fleet_file import fleet_toml, generate_fleet
from tests.marks import rest_slow

SEED, BATCH, TOKENS, BANDWIDTH_HZ = 5, 4, 10, 3e5


@pytest.fixture
def fleet():
    """Devices that are not in the order of their names; one is of no use."""
    first, second, *rest = generate_fleet(9, seed=1)
    return (
        *rest[::-1],
        replace(first, uplink_bps=2e6),
        # Computes fastest of all, and would send for days.
        replace(second, name="behind the hills", flops_per_s=1e15, snr_db=-60.0),
    )


@pytest.fixture
def coordinator(roberta, fleet):
    """Return a function that makes the coordinator of a run with this fleet."""

    def make(allocator, codec="fp32"):
        partition = partition_parameters(name for name, _ in roberta.named_parameters())
        made = coordinator_for(
            roberta,
            partition,
            costs=model_costs(
                roberta, partition, batch_size=BATCH, sequence_length=TOKENS
            ),
            batch_size=BATCH,
            settings=RoundSettings(
                channel=Channel(bandwidth_hz=BANDWIDTH_HZ),
                transfer=Transfer(codec=codec),
                allocation=AllocationOptions(allocator=allocator),
                seed=SEED,
            ),
        )
        for number, profile in enumerate(fleet):
            made.add_device(f"id-{number}", profile.to_properties())
        return made

    return make


def parts(record):
    return [
        {
            "block": part.block_index,
            "further_blocks": list(part.further_blocks),
            "depth": part.depth,
            "device": part.device,
            "share": part.share,
            "compute_s": part.compute_s,
            "upload_s": part.upload_s,
            "total_s": part.latency_s,
            "payload_bits": 8 * part.payload_bytes,
            "required_memory_bytes": part.required_memory_bytes,
            "memory_bytes": part.memory_bytes,
        }
        for part in record.blocks
    ]


@pytest.mark.parametrize("codec", rest_slow(["int8", "fp32"]))
@pytest.mark.parametrize("allocator", rest_slow(ALLOCATORS, 2))
def test_the_command_says_what_round_1_does(
    roberta, fleet, coordinator, tmp_path, capsys, allocator, codec
):
    run = coordinator(allocator, codec)
    plan = run.plan_round(1, [f"id-{n}" for n in range(len(fleet))])
    record = run.complete_round(plan, [])
    assert len({part.device for part in record.blocks}) == 3
    assert "behind the hills" not in {part.device for part in record.blocks}

    roberta.config.save_pretrained(tmp_path)
    (tmp_path / "fleet.toml").write_text(fleet_toml(fleet))
    options = {
        "--fleet": tmp_path / "fleet.toml",
        "--model": tmp_path,
        "--seed": SEED,
        "--batch-size": BATCH,
        "--max-length": TOKENS,
        "--bandwidth-hz": BANDWIDTH_HZ,
        "--allocator": allocator,
        "--codec": codec,
    }
    words = [str(word) for pair in options.items() for word in pair]
    assert main(["plan", "--json", *words]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["blocks"] == parts(record)
    assert said["round_s"] == record.round_s
    listed = {row["allocator"]: row["round_s"] for row in said["allocators"]}
    assert listed[allocator] == record.round_s


@pytest.mark.parametrize("allocator", rest_slow(["random", "exact"]))
def test_planned_rounds_are_those_of_a_run_that_learns_nothing(
    roberta, fleet, coordinator, tmp_path, allocator
):
    roberta.config.save_pretrained(tmp_path)
    costs = named_model_costs(str(tmp_path), batch_size=BATCH, sequence_length=TOKENS)
    planned = plan_rounds(
        fleet,
        costs,
        rounds=4,
        allocator=allocator,
        bandwidth_hz=BANDWIDTH_HZ,
        seed=SEED,
    )
    run = coordinator(allocator)
    for record in planned:
        plan = run.plan_round(
            record.server_round, [f"id-{n}" for n in range(len(fleet))]
        )
        assert parts(record) == parts(coordinator(allocator).complete_round(plan, []))
