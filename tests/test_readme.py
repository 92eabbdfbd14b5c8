"""The README's commands: all are checked, and the slow tests run them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from lola_flwr.cli.app_config import read_overrides
from lola_flwr.cli.main import main
from lola_flwr.simulation.flower_app import check_config, read_app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines() if line]
SIMULATE = "lola-flwr simulate "
RUNS = [line for line in COMMANDS if line.startswith(SIMULATE)]
# Takes no longer than a moment.
PLANS = [line for line in COMMANDS if line.startswith("lola-flwr plan ")]


def test_the_two_commands_stand_first():
    assert COMMANDS[:2] == ["make demo", "make test"]


@pytest.mark.parametrize("target", re.findall(r"`?make ([a-z-]+)", README))
def test_make_targets_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_every_command_is_run_by_a_test():
    others = ["make demo", "make test"]  # below, and this
    # A plain Flower command, which `lola-flwr simulate` calls.
    flower = [line for line in COMMANDS if line.startswith("flwr run ")]
    assert set(COMMANDS) == {*others, *flower, *RUNS, *PLANS}


def check_words(words):
    """Check what stands behind ``lola-flwr simulate``: app, devices, configuration."""
    directory, option, _, *overrides = words
    assert option == "--devices"
    app = read_app(ROOT / directory)
    check_config(app, {**app.config, **read_overrides(app, overrides)})


@pytest.mark.parametrize("command", RUNS)
def test_run_configurations_are_valid(command):
    check_words(shlex.split(command)[2:])


@pytest.mark.parametrize("command", PLANS)
def test_plans_work(command, capsys):
    assert main(shlex.split(command)[1:]) == 0


@pytest.mark.parametrize("path", re.findall(r"\]\(([^)h][^)]*)\)", README))
def test_links_lead_somewhere(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize("program", blocks("python"))
def test_programs_run(program):
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


@pytest.mark.parametrize("excerpt", blocks("py"))
def test_excerpts_stand_in_the_app(excerpt):
    app = ROOT / "simulations" / "quickstart" / "quickstart"
    assert any(excerpt in path.read_text() for path in app.glob("*.py"))


def test_each_row_of_a_table_has_its_command():
    rows = [line for line in README.splitlines() if line.startswith("| ")]
    for row in rows[1:]:
        commands = re.findall(r"`([^`]*)`", row.rpartition(" | ")[2])
        assert commands, row
        if commands[0].startswith(SIMULATE):
            check_words(shlex.split(" ".join(commands))[2:])


def test_apps_list_nothing_that_flower_would_install():
    for path in (ROOT / "simulations").glob("*/pyproject.toml"):
        assert tomllib.loads(path.read_text())["project"]["dependencies"] == [], path


def test_readme_can_be_read_in_one_go():
    assert len(README.splitlines()) <= 200


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("command", RUNS)
def test_runs_complete(command, tmp_path):
    glue = os.environ.get("LOLA_GLUE_DIR")
    if "path/to/glue" in command and not glue:
        pytest.skip("LOLA_GLUE_DIR does not name a directory with GLUE's TSV files")
    if "=hub" in command:
        pytest.skip("downloads from the hub")
    words = shlex.split(command.replace("path/to/glue", glue or ""))
    result = subprocess.run(
        [
            *(sys.executable, "-m", "lola_flwr.cli.main", *words[1:]),
            *("--home", str(tmp_path / "home"), "--out", str(tmp_path / "run")),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-2000:]
    assert result.stdout.splitlines()[-1].startswith("final: ")
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_demo_learns():
    result = subprocess.run(
        ["make", "demo"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    accuracy = re.search(r"^final: accuracy=([\d.]+)", result.stdout, re.MULTILINE)
    assert accuracy is not None
    assert float(accuracy[1]) >= 0.83
