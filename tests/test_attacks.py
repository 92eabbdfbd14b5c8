"""The attack bench: every attack runs, and what came of it is in the table."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest

from simulations.attacks.__main__ import ATTACKS, attacks_of, main
from simulations.attacks.attack import D2FT, LOLA
from simulations.attacks.federation import run
from simulations.attacks.scenario import MODELS, Scenario
from simulations.attacks.table import attack_rows


def outcome(attack, share, seed, accuracy, found_after=None):
    return {
        "attack": attack,
        "share": share,
        "split": "iid",
        "codec": "fp32",
        "seed": seed,
        "accuracy": accuracy,
        "backdoor": 0.1,
        "honest_refused": 0.01,
        "honest_distrusted": 0,
        "found": 0.5,
        "found_after": found_after,
    }


def test_points_lost_are_those_against_the_honest_run_of_the_seed():
    rows = attack_rows(
        [
            outcome("none", 0.0, 0, 0.9),
            outcome("none", 0.0, 1, 0.8),
            outcome("sign flip", 0.2, 0, 0.7, 12),
            outcome("sign flip", 0.2, 1, 0.7),
            outcome("sign flip", 0.3, 2, 0.5),
        ]
    )
    assert [row["share"] for row in rows] == ["0%", "20%", "30%"]
    assert [row["accuracy"] for row in rows] == [0.85, 0.7, 0.5]
    lost = [row["points lost"] for row in rows]
    assert lost[:2] == [0.0, 15.0]
    # Nothing to compare it with.
    assert math.isnan(lost[2])
    assert [row["after rounds"] for row in rows] == ["-", "12", "-"]


def test_what_missing_data_cost_is_told_apart():
    rows = attack_rows(
        [
            outcome("none", 0.0, 0, 0.9),
            outcome("not there", 0.2, 0, 0.85),
            outcome("sign flip", 0.2, 0, 0.7),
            outcome("sign flip", 0.3, 0, 0.5),
        ]
    )
    found = [(row["points lost"], row["than without them"]) for row in rows[1:]]
    assert found[:2] == [(5.0, 0.0), (20.0, 15.0)]
    assert found[2][0] == 40.0
    assert math.isnan(found[2][1])


# What a run was known by before scenarios said model and method.
BEFORE = (
    '["sign flip", {"share": 0.2, "alpha": null, "codec": "fp32", "seed": 0, '
    '"num_devices": 12, "rounds": 120, "batch_size": 16, "lr": 0.01, '
    '"own_examples": 64}]'
)


def test_a_run_is_known_by_its_scenario_and_as_before():
    scenario = Scenario(share=0.2, rounds=120)
    assert scenario.key("sign flip") == BEFORE
    others = [
        Scenario(share=0.2, model="minilm"),
        Scenario(share=0.2, method="d2ft"),
        Scenario(share=0.2, seed=1),
    ]
    keys = [one.key("sign flip") for one in (scenario, *others)]
    assert len({*keys, scenario.key("none")}) == 5
    for key, one in zip(keys[1:], others, strict=True):
        assert Scenario(**json.loads(key)[1]) == one


def test_what_was_finished_before_is_not_run_again(tmp_path, capsys):
    old = {
        name: value
        for name, value in outcome("sign flip", 0.2, 0, 0.654, 7).items()
        if name not in ("attack", "share", "split", "codec", "seed")
    }
    runs = tmp_path / "runs.jsonl"
    runs.write_text(json.dumps([BEFORE, old]) + "\n")
    options = ["--shares", "0.2", "--seeds", "1", "--splits", "iid", "--rounds", "120"]
    assert main([*options, "--attacks", "sign flip", "--out", str(tmp_path)]) == 0
    assert "| sign flip | 20% | iid | fp32 | 0.654 |" in capsys.readouterr().out
    assert len(runs.read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--model", "minilm", "--method", "d2ft"],
            "--model minilm: not with --method d2ft; choose from: small.",
        ),
        (
            ["--method", "d2ft", "--attacks", "none", "sign flip"],
            "Attack 'sign flip' does not exist under D2FT, where no device sends a "
            "block's gradient; choose from: none, label flip, backdoor, not there, ",
        ),
        (
            ["--attacks", "contributions turned round"],
            "Attack 'contributions turned round' does not exist under LoLa-DEFT, where "
            "no device sends hidden states; choose from: none, sign flip, ",
        ),
        (["--attacks", "dance"], "Unknown attack 'dance'; choose from: none, "),
        (["--method", "d2ft", "--codecs", "fp32", "int8"], "--codecs int8: under D2FT"),
        (["--method", "d2ft", "--own-examples", "64"], "--own-examples 64: under D2FT"),
    ],
)
def test_what_there_is_not_is_refused_in_one_line(options, said, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([*options, "--out", str(out)]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"error: {said}")
    assert not out.exists()


def test_every_attack_is_one_of_a_method():
    assert {*attacks_of(LOLA), *attacks_of(D2FT)} == {*ATTACKS.values()}
    both = {attack.name for attack in attacks_of(LOLA) if D2FT in attack.methods}
    assert both == {"none", "not there", "label flip", "backdoor"}
    assert MODELS.keys() == {LOLA, D2FT}


@pytest.mark.slow
def test_a_run_is_repeated_to_the_bit():
    scenario = Scenario(share=0.3, rounds=2, batch_size=4, own_examples=4)
    first, again = (run(scenario, ATTACKS["backdoor"]) for _ in range(2))
    assert json.dumps(asdict(first)) == json.dumps(asdict(again))


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_every_attack_runs_against_the_server_as_it_is(codec):
    attacks = attacks_of(LOLA)
    assert len(attacks) > 12
    for attack in attacks:
        came = run(Scenario(share=0.3, codec=codec, rounds=6), attack)
        assert 0.3 < came.accuracy < 0.8


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_servers_own_examples_find_who_stays_within_the_spread_of_honest_ones(
    seed,
):
    scenario = Scenario(share=0.2, rounds=240, own_examples=64, seed=seed)
    came = run(scenario, ATTACKS["a little is enough"])
    assert came.found == 1
    assert came.accuracy > 0.9
    # By chance an update or two of an honest device are not used.
    assert came.honest_refused < 0.02
    assert came.honest_distrusted <= 1
