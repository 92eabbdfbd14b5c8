"""The command as a whole: help, completion, and what it imports to show them."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest
import typer

from lola_flwr.cli.main import INTERRUPTED, MISUSED, app, main

GROUP = typer.main.get_command(app)
COMMANDS = [
    *([name] for name, found in GROUP.commands.items() if name != "fleet"),
    *(["fleet", name] for name in GROUP.commands["fleet"].commands),
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_has_an_example(command, capsys):
    assert main([*command, "--help"]) == 0
    assert f"lola-flwr {' '.join(command)}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("command", [[], ["fleet"]], ids=["nothing", "fleet"])
def test_nothing_asked_for_shows_what_there_is(command, capsys):
    assert main(command) == MISUSED
    shown = capsys.readouterr()
    assert "Commands" in shown.out
    assert shown.err == ""


def test_versions(capsys):
    assert main(["--version"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"lola-flwr {version('lola-flwr')}, flwr ")
    assert f"torch {version('torch')}" in said


def test_ctrl_c_says_so(monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("lola_flwr.system.fleet_file.generate_fleet", interrupt)
    assert main(["fleet", "generate", "3"]) == INTERRUPTED
    assert capsys.readouterr().err.split() == ["stopped"]


@pytest.mark.parametrize(
    ("typed", "completed"), [("pl", "plan"), ("fleet gen", "generate")]
)
def test_shell_completion(typed, completed, monkeypatch):
    program = "import sys; from lola_flwr.cli.main import main; sys.exit(main())"
    words = f"lola-flwr {typed}"
    monkeypatch.setenv("_LOLA_FLWR_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True
    )
    assert done.stdout.split() == [completed]


def test_help_waits_for_nothing_heavy():
    program = (
        "import sys\nfrom lola_flwr.cli.main import main\nmain(['--help'])\n"
        "heavy = {'torch', 'flwr', 'scipy', 'pydantic'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
