"""Whatever path a user gives, ``~`` is the home directory."""

from __future__ import annotations

import re
from pathlib import Path

import click
import numpy as np
import pytest
import typer

from lola_flwr.cli.main import app, main
from lola_flwr.cli.paths import LocalPath
from lola_flwr.clients.node import node_profile
from lola_flwr.deployment.app_code import DeviceContext
from lola_flwr.machine.files import expanded, local_path
from lola_flwr.model.loading import load_classifier
from lola_flwr.planning import named_model_costs
from lola_flwr.run.directory import run_directory
from lola_glue.device import device_fn
from lola_glue.tasks import load_task
from simulations.compare.__main__ import _parser
from simulations.figures.learning import app_config

ROOT = Path(__file__).parent.parent


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def commands(group, words=()):
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*words, name))
        else:
            yield " ".join((*words, name)), command


COMMANDS = dict(commands(typer.main.get_command(app)))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_path_of_a_command(command, home):
    paths = [p for p in COMMANDS[command].params if isinstance(p.type, click.Path)]
    assert paths or command in ("doctor", "node", "fleet presets")
    for parameter in paths:
        assert isinstance(parameter.type, LocalPath), parameter.name
        assert parameter.type.convert("~/x", parameter, None) == f"{home}/x"


def test_a_command_writes_and_reads_at_home(home):
    assert main(["fleet", "generate", "4", "--out=~/four.toml"]) == 0
    assert (home / "four.toml").is_file()
    assert main(["fleet", "validate", "~/four.toml"]) == 0


def test_a_model(home):
    model, tokenizer = load_classifier("random:roberta-tiny", num_labels=2)
    for part in (model, tokenizer):
        part.save_pretrained(home / "my-model")
    loaded, _ = load_classifier("~/my-model", num_labels=2)
    assert loaded.config.num_hidden_layers == 4
    assert len(named_model_costs("~/my-model").flops) == 4


def test_data_fleet_and_output_of_an_app(home):
    folder = home / "glue" / "SST-2"
    folder.mkdir(parents=True)
    for name in ("train", "dev"):
        (folder / f"{name}.tsv").write_text("sentence\tlabel\nfine \t1\ndull \t0\n")
    _, train, _ = load_task("sst-2", "~/glue")
    np.testing.assert_array_equal(train.labels, [1, 0])
    assert main(["fleet", "generate", "3", "--seed=7", "--out=~/three.toml"]) == 0
    context = DeviceContext(
        run_id=1,
        node_id=2,
        node_config={"partition-id": 1, "num-partitions": 3},
        run_config={**app_config(), "fleet": "~/three.toml"},
    )
    assert device_fn(context).profile.name in (home / "three.toml").read_text()
    assert run_directory("~/out", 3) == home / "out"


def test_a_profile(home):
    (home / "device.json").write_text(
        '{"lola-flwr-profile": 1, "name": "phone", "flops-per-s": 2e9, '
        '"memory-bytes": 4e9, "snr-db": 9.0}'
    )
    context = DeviceContext(
        run_id=1, node_id=2, node_config={"profile": "~/device.json"}, run_config={}
    )
    assert node_profile(context).name == "phone"


def test_paths_of_a_program(home):
    options = _parser().parse_args(["--out=~/results", "--glue=~/glue"])
    assert (options.out, options.glue) == (home / "results", home / "glue")


def test_what_is_no_path_stays_as_it_is(home):
    for text in ("minilm-l6", "org/model", "random:roberta-base", "", "a/~/b"):
        assert expanded(text) == text
    assert local_path("~") == home


def test_nothing_else_writes_it_out():
    found = [
        str(path.relative_to(ROOT))
        for room in ("lola_flwr", "clients", "strategies", "simulations")
        for path in (ROOT / room).rglob("*.py")
        if re.search(r"expanduser|type=Path\b", path.read_text())
    ]
    assert found == ["lola_flwr/machine/files.py"]
