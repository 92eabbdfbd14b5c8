"""What a user does first, with the wheel, in an environment of its own.

Nothing of the checkout is on the path or in the working directory, but for copies of an
app and of the notebook.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.installing import build_wheel, call, environment_with_dependencies, pip
from tests.tree import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

NOTEBOOK = ROOT / "docs" / "notebooks" / "plan-and-report.ipynb"
TINY = ('model="random:roberta-tiny"', "rounds=2", "batch-size=4", "num-devices=4")
# How runs differ, and what is in their directories besides rounds.jsonl.
RUNS = {
    "legacy": (('interface="legacy"',), ()),
    "message": (('interface="message"',), ()),
    "lora": (
        ('tuning="lora"', "save-model=true"),
        ("model/adapter_config.json", "model/adapter_model.safetensors"),
    ),
    "d2ft": (('method="d2ft"',), ()),
}


@dataclass(frozen=True)
class Installed:
    """An environment with the wheel, and a directory to work in."""

    programs: Path
    directory: Path

    def run(self, program, *words, **environment):
        """Run one of its programs; return what it prints."""
        home = {"HOME": str(self.directory / "home"), **environment}
        return call(self.programs / program, *words, cwd=self.directory, **home)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    wheel = build_wheel(ROOT, tmp_path_factory.mktemp("wheel"))
    directory = tmp_path_factory.mktemp("elsewhere")
    python = environment_with_dependencies(tmp_path_factory.mktemp("new") / "venv")
    # Nothing is fetched: whatever the extras ask for must be there.
    package = f"{wheel}[simulation,glue,adapters,offline]"
    pip("install", "--no-index", package, cwd=directory, python=python)
    shutil.copytree(ROOT / "simulations" / "glue", directory / "app")
    return Installed(python.parent, directory)


def rounds(directory):
    lines = (directory / "rounds.jsonl").read_text().splitlines()
    return [json.loads(line)["server_round"] for line in lines]


def test_doctor(installed):
    said = json.loads(installed.run("lola-flwr", "doctor", "--json"))
    assert [finding for finding in said if finding["status"] == "problem"] == []
    assert {"SuperLink", "Ray"} <= {finding["subject"] for finding in said}


def test_plan(installed):
    printed = installed.run("lola-flwr", "plan", "--devices", "12")
    assert "latency" in printed


@pytest.mark.parametrize("name", RUNS)
def test_simulate(installed, name):
    changes, files = RUNS[name]
    printed = installed.run(
        *("lola-flwr", "simulate", "app", "--devices", "4", "--plain"),
        *("--out", name, *TINY, *changes),
    )
    assert printed.splitlines()[-1].startswith("final: "), printed
    assert rounds(installed.directory / name) == [1, 2]
    for file in files:
        assert (installed.directory / name / file).is_file()


def test_report(installed):
    costs = "named_model_costs('roberta-base', batch_size=16)"
    installed.run(
        "python",
        "-c",
        "from lola_flwr.planning import named_model_costs, plan_rounds\n"
        "from lola_flwr.run.round_log import RoundLog\n"
        "from lola_flwr.system.fleet_file import generate_fleet\n"
        "import pathlib; pathlib.Path('planned').mkdir()\n"
        "log = RoundLog(pathlib.Path('planned/rounds.jsonl'))\n"
        f"for record in plan_rounds(generate_fleet(20), {costs}, rounds=3):\n"
        "    log.append(record)\n",
    )
    assert "report: " in installed.run("lola-flwr", "report", "planned")
    page = (installed.directory / "planned" / "report.html").read_text()
    assert "uPlot" in page, "its charts come with the wheel"


def test_flwr_run(installed):
    """Flower's own command, which leaves its SuperLink running."""
    home = installed.directory / "flower"
    output = installed.directory / "by-flower"
    changes = " ".join((*TINY, f'output-dir="{output}"'))
    try:
        printed = installed.run(
            *("flwr", "run", "app", "--stream", "--run-config", changes),
            *("--federation-config", "num-supernodes=4"),
            FLWR_HOME=str(home),
            PATH=f"{installed.programs}{os.pathsep}{os.environ['PATH']}",
        )
    finally:
        stop_programs_of(home)
    assert rounds(output) == [1, 2], printed
    assert f"lola-flwr report {output}" in printed


def stop_programs_of(home):
    """Stop what was started with an FLWR_HOME."""
    for process in psutil.process_iter():
        try:
            if process.environ().get("FLWR_HOME") == str(home):
                process.kill()
        except psutil.Error:
            continue


def test_flwr_build_and_install(installed):
    """What Flower packs and unpacks again is whole."""
    home = {"FLWR_HOME": str(installed.directory / "apps-home")}
    installed.run("flwr", "build", "--app", "app", **home)
    (packed,) = installed.directory.glob("*.fab")
    installed.run("flwr", "install", packed, **home)
    (unpacked,) = (installed.directory / "apps-home" / "apps").glob("*/pyproject.toml")
    simulate = ("simulate", unpacked.parent, "--devices", "4", "--plain")
    printed = installed.run("lola-flwr", *simulate, "--out", "unpacked", *TINY)
    assert rounds(installed.directory / "unpacked") == [1, 2], printed


def test_the_notebook(installed):
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    # As Jupyter does, the last expression of a cell is shown.
    program = (
        "import ast, json, sys\n"
        "names, shown = {}, []\n"
        "for source in json.loads(sys.argv[1]):\n"
        "    *body, last = ast.parse(source).body\n"
        "    exec(compile(ast.Module(body, []), 'cell', 'exec'), names)\n"
        "    last = ast.Expression(last.value)\n"
        "    shown.append(eval(compile(last, 'cell', 'eval'), names))\n"
        "report, (round_s, *_) = shown\n"
        "assert report._repr_html_().startswith('<iframe')\n"
        "assert round_s == report.runs[0].rounds[0].round_s\n"
        "print(len(shown))\n"
    )
    assert installed.run("python", "-c", program, json.dumps(code)) == "2\n"
