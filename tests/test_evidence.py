"""The evidence: its claims, how they are judged, and its runs from start to table."""

from __future__ import annotations

import csv
import json

import pytest

from lola_flwr.errors import UserError
from lola_glue.config import GlueConfig
from simulations.evidence.__main__ import CLAIMS, main
from simulations.evidence.claims import (
    BASELINE,
    OURS,
    Claim,
    end_rows,
    end_table,
    read_claims,
    verdict_rows,
)
from simulations.figures.learning import LearningRun, app_config

CLAIM = Claim(at_least={"f1": 0.84}, within=0.02, time_share=0.1)


def run(method, seed, *, f1, step_s, target="", **block):
    """Fabricate a run of two rounds; one of three devices is lost in the second."""
    block = {"received_bytes": 2e6, "sent_bytes": 5e6, **block}
    accepted, lost = {**block, "status": "accepted"}, {**block, "status": "missing"}
    records = [
        {"wireless_s": step_s, "metrics": {}, "blocks": [accepted] * 3},
        {
            "wireless_s": 2 * step_s,
            "metrics": {"loss": 0.5, "f1": f1},
            "blocks": [accepted, accepted, lost],
        },
    ]
    config = {"batch-size": 16, "target": target}
    return LearningRun("mrpc", method, seed, config, records)


def verdicts(claim, ours, baseline):
    runs = [
        run(method, seed, **values)
        for method, of_method in ((OURS, ours), (BASELINE, baseline))
        for seed, values in enumerate(of_method)
    ]
    rows = verdict_rows("mrpc", claim, end_rows(runs))
    return {row["what"]: (row["measured"], row["holds"]) for row in rows}


def test_a_run_is_summed_up():
    (row,) = end_rows([run(OURS, 0, f1=0.8, step_s=3.0)])
    assert row["samples"] == 5 * 16
    assert (row["wireless_s"], row["rounds"], row["f1"]) == (6.0, 2, 0.8)
    # Bytes of what was lost were spent, too.
    assert (row["up_mb"], row["down_mb"]) == (12.0, 30.0)
    (own,) = end_rows([run(OURS, 0, f1=0.8, step_s=3.0, batch_size=24)])
    assert own["samples"] == 5 * 24


def test_claims_are_about_means():
    ours = [{"f1": 0.80, "step_s": 1.0}, {"f1": 0.90, "step_s": 9.0}]
    baseline = [{"f1": 0.86, "step_s": 40.0}, {"f1": 0.87, "step_s": 60.0}]
    assert verdicts(CLAIM, ours, baseline) == {
        "f1": (0.85, "yes"),
        "f1 behind the baseline's": (0.015, "yes"),
        "samples, of the baseline's": (1.0, "yes"),
        "wireless time, of the baseline's": (0.1, "yes"),
    }


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"f1": 0.839}, "f1"),
        ({"f1": 0.849}, "f1 behind the baseline's"),
        ({"step_s": 5.1}, "wireless time, of the baseline's"),
        ({"batch_size": 17}, "samples, of the baseline's"),
    ],
)
def test_what_does_not_hold_is_said(change, what):
    ours = {"f1": 0.851, "step_s": 5.0, **change}
    found = verdicts(CLAIM, [ours], [{"f1": 0.87, "step_s": 50.0}])
    assert found[what][1] == "no"


def test_time_is_compared_where_all_have_reached_the_target():
    claim = Claim(time_share=0.1)
    ours, baseline = ({"f1": 0.9, "step_s": s, "target": "f1>=0.8"} for s in (1.0, 20))
    assert verdicts(claim, [ours], [baseline]) == {
        "wireless time, of the baseline's": (0.05, "yes")
    }
    late = {**baseline, "f1": 0.7}
    assert verdicts(claim, [ours], [late]) == {
        "runs that reached the target": (1.0, "no")
    }


def test_the_table_shows_every_seed():
    runs = [run(OURS, seed, f1=f1, step_s=1.0) for seed, f1 in enumerate((0.8, 0.9))]
    (line,) = end_table(end_rows(runs))
    assert line["metrics, mean (by seed)"] == "f1 0.850 (0.800, 0.900)"
    assert line["samples"] == 80


def test_the_recipes_are_configurations():
    methods, claims = read_claims(CLAIMS)
    assert set(claims) == {"cola", "mrpc", "sst-2"}
    for task, claim in claims.items():
        assert set(claim.methods) <= set(methods)
        for method, of_method in methods.items():
            changes = {**claim.config, **of_method, **claim.methods.get(method, {})}
            assert set(changes) <= set(app_config())
            config = {**app_config(), **changes, "task": task, "data-dir": "glue"}
            GlueConfig.from_run_config(config)


@pytest.mark.parametrize(
    "text",
    [
        "[methods",
        "[methods.lola-deft]\n[tasks.cola]\n",
        "[methods.lola-deft]\n[methods.'fedavg-full+shares']\n[tasks.cola]\nfast=1\n",
    ],
)
def test_what_are_no_claims_is_refused(text, tmp_path):
    path = tmp_path / "claims.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"claims\.toml cannot be read"):
        read_claims(path)


def test_an_unknown_task_is_refused(capsys):
    assert main(["--tasks", "mnli"]) == 1
    assert "No claim about 'mnli'" in capsys.readouterr().out


@pytest.mark.slow
def test_from_start_to_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))
    claims = tmp_path / "claims.toml"
    claims.write_text(
        "[methods.lola-deft]\ncodec = 'int8'\n"
        "[methods.'fedavg-full+shares']\nmethod = 'fedavg-full'\n"
        "[tasks.acceptability]\nat-least = { accuracy = 2.0 }\nwithin = 1.0\n"
        "time-share = 0.9\n[tasks.acceptability.config]\n"
        "model = 'random:roberta-tiny'\nrounds = 2\nbatch-size = 2\neval-every = 1\n"
    )
    out = tmp_path / "out"
    options = [f"--claims={claims}", f"--out={out}", "--seeds=2", "--devices=4"]
    assert main([*options, "--style=paper", "--format=pdf"]) == 0
    assert (out / "evidence.pdf").is_file()
    with (out / "verdicts.csv").open(newline="") as file:
        found = {row["what"]: row["holds"] for row in csv.DictReader(file)}
    assert found == {
        "accuracy": "no",
        "accuracy behind the baseline's": "yes",
        "samples, of the baseline's": "yes",
        "wireless time, of the baseline's": "yes",
    }
    records = [
        json.loads(line)
        for line in (out / "runs" / "acceptability-lola-deft-seed0" / "rounds.jsonl")
        .read_text()
        .splitlines()
    ]
    assert {block["codec"] for block in records[-1]["blocks"]} == {"int8"}
    assert "finished before" not in capsys.readouterr().out
    assert main(options) == 0
    assert capsys.readouterr().out.count("finished before") == 4
