"""``lola-flwr keys``, and what the shell completes of an app's keys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from click.shell_completion import ShellComplete

from lola_flwr.cli.app_keys import app_keys
from lola_flwr.cli.main import FAILED, app, main
from lola_flwr.simulation.flower_app import read_app
from lola_flwr.wire.codec import CODECS

SIMULATIONS = Path(__file__).parents[2] / "simulations"
GLUE = str(SIMULATIONS / "glue")
APPS = [path.parent.name for path in SIMULATIONS.glob("*/pyproject.toml")]
OWN_APP = """
[tool.flwr.app]
publisher = "x"

# Of the table.
[tool.flwr.app.config]
# Not of a key: an empty line follows.

# Rounds # of
# the run.
rounds = 3 # three
lr = 0.1
[tool.flwr.app.config.inner]
# Deep.
key = "x"
"""


def listed(capsys, *words):
    assert main(["keys", *words, "--json"]) == 0
    return {key["name"]: key for key in json.loads(capsys.readouterr().out)}


@pytest.mark.parametrize("name", APPS)
def test_every_key_of_our_apps_is_listed_and_says_what_it_does(name, capsys):
    directory = SIMULATIONS / name
    found = listed(capsys, str(directory))
    assert list(found) == list(read_app(directory).config)
    assert [key for key, of in found.items() if not of["comment"]] == []


def test_what_a_key_takes_is_what_its_schema_says(capsys):
    found = listed(capsys, GLUE)
    assert found["rounds"]["kind"] == "a whole number, at least 1"
    assert found["lr"]["kind"] == "a number, above 0, at most 100"
    assert found["sampler"]["values"] == ["random", "entropy", "coreset", "history"]
    assert found["sampler"]["is_closed"]
    assert found["batch-size"]["kind"] == "a whole number, at least 1 or auto"
    assert found["batch-size"]["values"] == ["auto"]
    assert {*CODECS} < {*found["codec"]["values"]}
    assert not found["codec"]["is_closed"]
    # Keys of every method.
    assert found["d2ft-options"]["default"] == ""


def test_comments_stand_above_a_key_and_behind_it(tmp_path):
    (tmp_path / "pyproject.toml").write_text(OWN_APP)
    rounds, lr, key = app_keys(read_app(tmp_path))
    assert (rounds.name, rounds.comment) == ("rounds", "Rounds # of the run. three")
    assert (lr.comment, lr.kind) == ("", "a number")
    assert (key.name, key.comment) == ("inner.key", "Deep.")


def test_a_word_chooses(capsys):
    assert main(["keys", GLUE, "Codec-Slack"]) == 0
    assert "\ncodec-slack=0.1  a number, at least 0\n" in capsys.readouterr().out
    assert main(["keys", GLUE, "rouns"]) == FAILED
    assert "Did you mean 'rounds'?" in capsys.readouterr().err


class TestCompletion:
    def completed(self, *before, incomplete):
        shell = ShellComplete(typer.main.get_command(app), {}, "lola-flwr", "_")
        found = shell.get_completions(list(before), incomplete)
        return [item.value for item in found]

    @pytest.mark.parametrize(
        ("before", "incomplete", "values"),
        [
            (["simulate", GLUE], "rou", ["rounds=", "round-timeout-s="]),
            (["simulate", GLUE], "codec=b", ["codec=bf16"]),
            (
                ["simulate", GLUE, "rounds=3"],
                "save-model=",
                ["save-model=true", "save-model=false"],
            ),
            (["simulate", GLUE], "rounds=", []),
            # What bash makes of codec=b, and of codec=.
            (["simulate", GLUE, "codec", "="], "b", ["bf16"]),
            (
                ["simulate", GLUE, "sampler"],
                "=",
                ["random", "entropy", "coreset", "history"],
            ),
            (["keys", GLUE], "rou", ["rounds", "round-timeout-s"]),
            (["simulate", "nowhere"], "rou", []),
        ],
    )
    def test_keys_and_values(self, before, incomplete, values):
        assert self.completed(*before, incomplete=incomplete) == values
