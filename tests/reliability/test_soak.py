"""Hundreds of rounds of the real app under faults of all kinds, and under attack."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial

import pytest

from tests.reliability.app_run import AppGrid, run_app
from tests.reliability.faults import (
    ACCIDENTS,
    LIES,
    TOO_LARGE,
    FaultyGrid,
    HostileGrid,
    rss_slope_bytes_per_round,
)

# Small steps of the demo's model on the demo's task: a device's takes some 20 ms.
SMALL = {"batch_size": 8, "max_length": 16, "checkpoint_every": 25}
DEFENDED = {"norm_factor": 2.0}


def accepted(records):
    return sum(b["status"] == "accepted" for r in records for b in r["blocks"])


def refusals(records):
    return sum((Counter(record["refused"]) for record in records), Counter())


def soak(tmp_path, rounds, **options):
    grids = []

    def make_grid(config):
        grids.append(FaultyGrid(config, rate=0.3))
        return grids[0]

    records = run_app(
        tmp_path, make_grid=make_grid, num_devices=8, rounds=rounds, **options
    )
    return records, grids[0]


def assert_all_is_accounted_for(records, grid, rounds):
    assert [record["server_round"] for record in records] == [*range(1, rounds + 1)]
    expected = Counter({k: n for k, n in grid.expected.items() if k is not None})
    refused = refusals(records)
    # These are refused once enough is known about a block, and scaled down before. Of
    # small batches an honest one may be as large, when the others are all learned.
    too_large = refused.pop("excessive-norm", 0)
    # Who sends one after the other rests a while.
    distrusted = refused.pop("distrusted", 0)
    assert distrusted <= 0.05 * accepted(records)
    lies = sum(grid.counts[kind] for kind in TOO_LARGE)
    assert too_large <= lies + 0.01 * accepted(records)
    assert refused == expected
    without = sum(
        block["status"] == "no reply" for r in records for block in r["blocks"]
    )
    # A late reply that was refused in a later round is not that round's.
    assert without <= sum(grid.counts[kind] for kind in ACCIDENTS)


@pytest.mark.slow
def test_a_short_soak_counts_every_fault(tmp_path):
    tiny = {"model": "random:roberta-tiny", "batch_size": 2, "max_length": 8}
    records, grid = soak(tmp_path, 10, eval_every=100, **tiny)
    assert_all_is_accounted_for(records, grid, 10)
    assert len(grid.counts) > 8


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_300_rounds_with_30_percent_faults(tmp_path, capsys):
    records, grid = soak(tmp_path / "faults", 300, eval_every=300, **SMALL, **DEFENDED)
    assert_all_is_accounted_for(records, grid, 300)
    assert set(grid.counts) >= {*LIES, *ACCIDENTS, "all gone", "lying profile"}
    updates = accepted(records)
    clean = run_app(
        tmp_path / "clean",
        make_grid=AppGrid,
        num_devices=8,
        rounds=round(updates / 6),
        eval_every=300,
        **SMALL,
        **DEFENDED,
    )
    slope = rss_slope_bytes_per_round(grid.rss_bytes)
    accuracy = [run[-1]["metrics"]["accuracy"] for run in (records, clean)]
    with capsys.disabled():
        print(
            f"\nsoak: {updates} updates accepted, faults {json.dumps(grid.counts)}, "
            f"refused {json.dumps(refusals(records))}; RSS {grid.rss_bytes[-1]:.4g} B, "
            f"{slope:+.0f} B a round; accuracy {accuracy[0]:.4f}, without faults "
            f"{accuracy[1]:.4f} after {len(clean)} rounds"
        )
    assert accuracy[0] >= accuracy[1] - 0.03
    assert slope < 100e3


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_fifth_of_hostile_devices(tmp_path, capsys):
    def accuracy(name, hostile, **defence):
        make_grid = partial(HostileGrid, share=hostile)
        records = run_app(
            tmp_path / name,
            make_grid=make_grid,
            num_devices=20,
            devices_per_block=3,
            rotation_eps=0.5,
            rounds=60,
            eval_every=60,
            **SMALL,
            **defence,
        )
        return records[-1]["metrics"]["accuracy"]

    none = {"norm_factor": 0.0, "max_gradient_norm": 1e9, "reputation": False}
    table = {
        "clean, no defence": accuracy("clean", 0.0, **none),
        "hostile, no defence": accuracy("bare", 0.2, **none),
        "hostile, norm factor 2": accuracy("defended", 0.2, **DEFENDED),
        "clean, norm factor 2": accuracy("cost", 0.0, **DEFENDED),
        "hostile, norm factor 2 and median": accuracy(
            "median", 0.2, **DEFENDED, block_mean="median"
        ),
    }
    with capsys.disabled():
        print("\n" + "\n".join(f"{name}: {value:.4f}" for name, value in table.items()))
    clean = table["clean, no defence"]
    assert table["hostile, norm factor 2"] >= clean - 0.05
    assert table["hostile, no defence"] < clean - 0.15
