"""What a target will take: planned rounds, summed up as often as runs needed them."""

import json

import numpy as np
import pytest

from lola_flwr.cli.forecast import likely
from lola_flwr.cli.main import main
from lola_flwr.errors import UserError
from lola_flwr.planning import forecast, named_model_costs, plan_rounds, planned_rounds
from lola_flwr.planning.forecast import PlannedRounds
from lola_flwr.planning.known import AllocationOptions, RunStatement
from lola_flwr.run.records import BlockRecord, RoundRecord
from lola_flwr.system.channel import Channel
from lola_flwr.system.devices import FleetRanges
from lola_flwr.system.fleet_file import fleet_toml, generate_fleet
from lola_flwr.system.mobility import Mobility

FLEET = generate_fleet(8, seed=1, ranges=FleetRanges().with_powers())
COSTS = named_model_costs("minilm-l6")


def test_rounds_are_those_of_a_run():
    planned = planned_rounds(RunStatement(costs=COSTS, seed=3), FLEET, count=5)
    records = plan_rounds(FLEET, COSTS, rounds=5, seed=3)
    assert planned.round_s.tolist() == [record.round_s for record in records]
    assert planned.joules.tolist() == [record.round_j for record in records]
    assert planned.coverage == 1.0
    silent = planned_rounds(RunStatement(costs=COSTS), generate_fleet(8), count=2)
    assert silent.joules is None


def planned(round_s, joules=None):
    values = None if joules is None else np.array(joules)
    return PlannedRounds(np.array(round_s), values, 1.0)


def test_rounds_that_are_alike_are_multiplied():
    found = forecast(planned([2.0, 2.0], [3.0, 3.0]), [(4, 5)])
    assert (found.rounds.low, found.rounds.median, found.rounds.high) == (5, 5, 5)
    assert found.wireless_s.low == found.wireless_s.high == 10.0
    assert found.joules.median == 15.0
    assert forecast(planned([2.0]), [(4, 5)]).joules is None


def test_rounds_between_evaluations_are_as_likely_as_one_another():
    found = forecast(planned([1.0]), [(10, 20)])
    assert (found.rounds.low, found.rounds.high) == (11, 20)
    assert found.rounds.median == pytest.approx(15.5, abs=1)
    assert found.wireless_s == found.rounds


def test_runs_are_as_likely_as_one_another():
    found = forecast(planned([1.0]), [(9, 10), (29, 30)])
    assert (found.rounds.low, found.rounds.high) == (10, 30)


def test_the_range_is_that_of_sums_of_draws():
    rng = np.random.default_rng(0)
    round_s = rng.exponential(size=200)
    found = forecast(planned(round_s), [(99, 100)])
    # A sum of 100 is normal by then.
    spread = 1.645 * round_s.std() * 10
    middle = 100 * round_s.mean()
    assert found.wireless_s.median == pytest.approx(middle, rel=0.02)
    assert found.wireless_s.high - middle == pytest.approx(spread, rel=0.15)
    assert middle - found.wireless_s.low == pytest.approx(spread, rel=0.15)


CONFIG = {
    **{"model": "minilm-l6", "stack": "", "batch-size": 32, "max-length": 64},
    **{"tuning": "full", "method": "lola-deft", "target": "accuracy>=0.8"},
}


def finished(directory, blocks=range(6), **config):
    """A run whose accuracy is 0.5, 0.6, ... in every second of ten rounds."""
    parts = tuple(
        BlockRecord(b, 6 - b, "d", 0.1, 1.0, 1.0, 1.0, "", 0.5, "accepted")
        for b in blocks
    )
    directory.mkdir()
    records = [
        RoundRecord(
            n,
            6,
            1.0 * n,
            blocks=parts,
            metrics={} if n % 2 else {"accuracy": 0.4 + n / 20},
        )
        for n in range(1, 11)
    ]
    lines = [record.to_json() + "\n" for record in records]
    (directory / "rounds.jsonl").write_text("".join(lines))
    (directory / "run.json").write_text(json.dumps({"config": {**CONFIG, **config}}))
    return str(directory)


@pytest.fixture
def fleet(tmp_path):
    path = tmp_path / "fleet.toml"
    path.write_text(fleet_toml(FLEET))
    return ["plan", "--fleet", str(path), "--model", "minilm-l6"]


@pytest.mark.slow
def test_the_command_says_what_a_target_takes(fleet, tmp_path, capsys):
    run = finished(tmp_path / "run")
    assert main([*fleet, "--like", run, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["forecast"]
    assert (told["target"], told["num_runs"]) == ("accuracy>=0.8", 1)
    # 0.8 in round 8, and not in round 6.
    assert (told["rounds"]["low"], told["rounds"]["high"]) == (7, 8)
    assert 0 < told["wireless_s"]["low"] < told["wireless_s"]["median"]
    assert told["joules"]["median"] < told["joules"]["high"]


@pytest.mark.slow
def test_in_words_and_of_several_runs(fleet, tmp_path, capsys):
    runs = [finished(tmp_path / name) for name in ("a", "b")]
    like = [word for run in runs for word in ("--like", run)]
    assert main([*fleet, *like, "--target", "accuracy>=0.6"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "To accuracy>=0.6, as 2 runs took: " in said
    assert "and of the runs' rounds." in said


@pytest.mark.parametrize(
    ("config", "options", "says"),
    [
        ({}, ["--target", "accuracy>=0.95"], "never reached accuracy>=0.95"),
        ({}, ["--target", "f1>=0.5"], "no 'f1'; it has accuracy"),
        ({"target": ""}, [], "had no target; say what is to be reached"),
        ({"batch-size": 64}, [], "batch-size=64, and the plan 32"),
        ({"tuning": "lora"}, [], "tuning='lora', and the plan 'full'"),
    ],
)
def test_a_run_that_does_not_tell_is_refused(
    fleet, tmp_path, capsys, config, options, says
):
    run = finished(tmp_path / "run", **config)
    assert main([*fleet, "--like", run, *options]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


@pytest.mark.parametrize(
    "options",
    [
        {"allocation": AllocationOptions(batch_sizes=(8, 16))},
        {"channel": Channel(own_rates=lambda profiles, moment: [1e6] * len(profiles))},
        {"channel": Channel(fading="gauss-markov")},
        {"channel": Channel(mobility=Mobility())},
    ],
)
def test_rounds_that_depend_on_those_before_are_not_drawn(options, tmp_path):
    run = RunStatement(costs=COSTS, **options)
    with pytest.raises(UserError, match="they depend on those before; leave it out"):
        likely(run, FLEET, [tmp_path], None, {})


@pytest.mark.slow
def test_rounds_that_train_fewer_blocks_are_no_measure(fleet, tmp_path, capsys):
    run = finished(tmp_path / "run", blocks=range(3))
    assert main([*fleet, "--like", run]) == 1
    assert "trained 50% of 6 blocks, one that is planned 100%" in (
        capsys.readouterr().err
    )


def test_a_target_needs_a_run(fleet, capsys):
    assert main([*fleet, "--target", "accuracy>=0.9"]) == 1
    assert "needs a run that got there: --like" in capsys.readouterr().err
