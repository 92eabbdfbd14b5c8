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

from lola_glue.config import GlueConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
APP_CONFIG = tomllib.loads((ROOT / "simulations/glue/pyproject.toml").read_text())[
    "tool"
]["flwr"]["app"]["config"]


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines() if line]
RUNS = [line for line in COMMANDS if line.startswith("python simulations/run.py")]


def test_the_two_commands_stand_first():
    assert COMMANDS[:2] == ["make demo", "make test"]


@pytest.mark.parametrize("target", re.findall(r"`?make ([a-z-]+)", README))
def test_make_targets_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("command", RUNS)
def test_run_configurations_are_valid(command):
    words = shlex.split(command)
    overrides = tomllib.loads("\n".join(word for word in words if "=" in word))
    assert overrides.keys() <= APP_CONFIG.keys()
    GlueConfig.from_run_config({**APP_CONFIG, **overrides})


@pytest.mark.parametrize("path", re.findall(r"\]\(([^)h][^)]*)\)", README))
def test_links_lead_somewhere(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize("program", blocks("python"))
def test_programs_run(program):
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("command", RUNS)
def test_runs_complete(command, tmp_path):
    glue = os.environ.get("LOLA_GLUE_DIR")
    if "path/to/glue" in command and not glue:
        pytest.skip("LOLA_GLUE_DIR does not name a directory with GLUE's TSV files")
    if '"hub"' in command:
        pytest.skip("downloads from the hub")
    words = shlex.split(command.replace("path/to/glue", glue or ""))
    result = subprocess.run(
        [sys.executable, *words[1:], "--home", str(tmp_path / "home")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-2000:]
    assert result.stdout.splitlines()[-1].startswith("final: ")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_demo_learns():
    result = subprocess.run(
        ["make", "demo"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    accuracy = re.search(r"^final: accuracy=([\d.]+)", result.stdout, re.MULTILINE)
    assert accuracy is not None
    assert float(accuracy[1]) >= 0.75
