"""What users get wrong: each mistake is one line that helps, and an exit code."""

from __future__ import annotations

from pathlib import Path

import pytest

from lola_flwr import simulation
from lola_flwr.cli.main import FAILED, MISUSED, main
from lola_flwr.system.fleet_file import fleet_toml, generate_fleet

GLUE = str(Path(__file__).parents[2] / "simulations" / "glue")
CAUSAL = str(Path(GLUE).with_name("causal"))
FLEET = fleet_toml(generate_fleet(3))
FILES = {
    "fleet.toml": FLEET,
    "not.toml": "[[device",
    "typo.toml": FLEET.replace("snr-db", "snr"),
    "twice.toml": FLEET.replace("device-0001", "device-0000"),
    "loud.toml": FLEET.replace("snr-db = ", "snr-db = 9"),
    "empty-run/rounds.jsonl": "",
    "broken-run/rounds.jsonl": "{}\n",
    "lines.jsonl": '{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n',
    "no-app/pyproject.toml": "[project]\nname = 'x'\n",
}

# Command, exit code, and what the line has to say.
MISTAKES = [
    ("simulat", MISUSED, "simulate"),
    ("simulat nowhere", MISUSED, "Did you mean 'simulate'?"),
    ("simulate GLUE --rounds 3", MISUSED, "without dashes: rounds=3"),
    ("simulate GLUE --batch_size=8", MISUSED, "without dashes: batch-size=8"),
    ("simulate GLUE --save-model --devices 6", MISUSED, ": save-model=true"),
    ("simulate GLUE --taskk --devices 6", MISUSED, ': task="acceptability"'),
    ("simulate GLUE --devces 3", MISUSED, "--devices"),
    ("simulate nowhere --rounds 3", MISUSED, "No such option"),
    ("plan --devces 3", MISUSED, "--devices"),
    ("plan --devices many", MISUSED, "'many' is not a valid int"),
    ("plan --devices 0", FAILED, "at least 1 device, not 0"),
    ("plan --fleet nowhere.toml", FAILED, "lola-flwr fleet generate"),
    ("plan --fleet fleet.toml --devices 3", FAILED, "drop one"),
    ("plan --fleet not.toml", FAILED, "not.toml: This is no TOML"),
    ("plan --model robrta-base", FAILED, "Did you mean 'roberta-base'?"),
    ("plan --model empty-run", FAILED, "'empty-run' has no config.json"),
    ("plan --allocator exct", FAILED, "Did you mean 'exact'?"),
    ("plan --codec zip", FAILED, "choose from fp32"),
    ("plan --codec auto", FAILED, "plan with one, such as"),
    ("plan --bandwidth-hz -1", FAILED, "positive number of hertz"),
    ("plan --batch-size 100000", FAILED, "Lower the batch size"),
    ("fleet generate", MISUSED, "Missing argument"),
    ("fleet generate 3 --out fleet.toml", FAILED, "exists already"),
    ("fleet generate 3 --out nowhere/fleet.toml", FAILED, "cannot be written"),
    ("fleet validate typo.toml", FAILED, "Did you mean 'snr-db'?"),
    ("fleet validate twice.toml", FAILED, "give each a name of its own"),
    ("fleet show loud.toml", FAILED, "must be a number from -60 to 80"),
    ("plan --allocator nomod:f", FAILED, "its directory on PYTHONPATH"),
    ("profile --out nowhere/a.json", FAILED, "nothing can be written there"),
    ("profile --out empty-run", FAILED, "nothing can be written there"),
    ("simulate nowhere --devices 6", FAILED, "no pyproject.toml"),
    ("simulate no-app --devices 6", FAILED, "no [tool.flwr.app]"),
    ("simulate GLUE", FAILED, "Give --devices"),
    ("simulate GLUE --devices 0", MISUSED, "0 is not in the range x>=1"),
    ("simulate GLUE --devices 6 num-devices=7", FAILED, "leave one of them out"),
    ("simulate GLUE --fleet fleet.toml --devices 6", FAILED, "has 3 devices"),
    ("simulate GLUE --devices 6 rouns=3", FAILED, "Did you mean 'rounds'?"),
    ("simulate GLUE --devices 6 rounds", FAILED, "write key=value"),
    ("simulate GLUE --devices 6 rounds=ten", FAILED, "as in rounds=40"),
    ("simulate GLUE --devices 6 rounds=0", FAILED, "greater than or equal to 1"),
    ("simulate GLUE --devices 6 codec=zip", FAILED, "choose from fp32"),
    ("simulate GLUE --devices 6 trackers=wandbb", FAILED, "Did you mean 'wandb'?"),
    (
        "simulate GLUE --devices 6 backups=1 participation=all",
        FAILED,
        "drop one of the two",
    ),
    (
        "simulate GLUE --devices 6 backups=1 latency-target-s=5",
        FAILED,
        "has no room for",
    ),
    (
        "simulate GLUE --devices 6 method=fedavg-full rotation-eps=0.1",
        FAILED,
        "set it to 0",
    ),
    ("simulate GLUE --devices 6 task=cole", FAILED, 'Did you mean "cola"?'),
    ("simulate GLUE --devices 6 allocator=greedi", FAILED, "Did you mean 'greedy'?"),
    ("simulate CAUSAL --devices 4 base=nf4", FAILED, "trains the base itself"),
    (
        "simulate GLUE --devices 6 tuning=lora pruning=heads=2",
        FAILED,
        "heads=2 must be a share of at least 0 and below 1",
    ),
    ("simulate GLUE --devices 6 pruning=heads=0.5", FAILED, "is of a base under LoRA"),
    ("simulate CAUSAL --devices 4 data=x", FAILED, "data='x' cannot be read"),
    (
        "simulate CAUSAL --devices 4 data=lines.jsonl",
        FAILED,
        "lines.jsonl:2: completion is missing",
    ),
    ("report nowhere", FAILED, "has no rounds.jsonl"),
    ("report empty-run", FAILED, "holds no round yet"),
    ("report broken-run", FAILED, "line 1 is no record"),
    ("report", FAILED, "There is no run in runs/"),
]


@pytest.fixture
def directory(tmp_path, monkeypatch):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)

    def run_app(*arguments, **options):
        raise AssertionError("Flower would have been started")

    monkeypatch.setattr(simulation, "run_app", run_app)


@pytest.mark.parametrize(("command", "code", "message"), MISTAKES)
def test_one_line_that_helps(directory, command, code, message, capsys):
    assert main(command.replace("GLUE", GLUE).replace("CAUSAL", CAUSAL).split()) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert message in shown.err
    assert shown.err.count("\n") == 1
    assert shown.err.count("Did you mean") <= 1
    assert "Traceback" not in shown.err
