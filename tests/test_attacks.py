"""The attack bench: every attack runs, and what came of it is in the table."""

from __future__ import annotations

import math

import pytest

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


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_every_attack_runs_against_the_server_as_it_is(codec):
    from simulations.attacks.__main__ import ATTACKS
    from simulations.attacks.federation import Scenario, run

    assert len(ATTACKS) > 12
    for attack in ATTACKS.values():
        came = run(Scenario(share=0.3, codec=codec, rounds=6), attack)
        assert 0.3 < came.accuracy < 0.8


@pytest.mark.slow
def test_the_servers_own_examples_find_who_stays_within_the_spread_of_honest_ones():
    from simulations.attacks.__main__ import ATTACKS
    from simulations.attacks.federation import Scenario, run

    scenario = Scenario(share=0.2, rounds=60, own_examples=64)
    came = run(scenario, ATTACKS["a little is enough"])
    assert came.found == 1
    # By chance an update or two of an honest device are not used.
    assert came.honest_refused < 0.02
    assert came.honest_distrusted <= 1
