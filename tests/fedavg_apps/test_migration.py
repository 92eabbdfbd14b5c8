"""Two FedAvg projects, switched to LoLa-DEFT exactly as docs/migration.md says."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from lola_flwr.simulation import run_app

pytestmark = pytest.mark.flower_run

HERE = Path(__file__).parent
PAGE = HERE.parent.parent / "docs" / "migration.md"
DIFFS = dict(
    re.findall(r"^```diff\n--- (\S+)\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.M)
)
KINDS = ("message", "legacy")


def marked(diff, mark):
    return [line[1:] for line in diff.splitlines() if line.startswith(mark)]


def switched(kind, directory):
    """Copy a project and change it as the page says."""
    app = directory / kind
    shutil.copytree(HERE / kind, app, ignore=shutil.ignore_patterns("__pycache__"))
    for path, diff in DIFFS.items():
        if not path.startswith(kind):
            continue
        text = (directory / path).read_text()
        for hunk in diff.split("@@\n"):
            lines = [(line[:1], line[1:]) for line in hunk.splitlines(keepends=True)]
            old = "".join(line for mark, line in lines if mark != "+")
            new = "".join(line for mark, line in lines if mark != "-")
            assert text.count(old) == 1, f"{path}: {text.count(old)} times:\n{old}"
            text = text.replace(old, new)
        (directory / path).write_text(text)
    return app


def run(app, tmp_path, *overrides):
    finished = run_app(
        app,
        num_devices=3,
        run_config=overrides,
        home=tmp_path / "home",
        # One process that imports PyTorch is enough.
        cpus_per_client=os.cpu_count() or 1,
    )
    assert finished.completed, finished.output
    return finished.output


def losses(output):
    """Losses on held-out data: before the first round, and after each."""
    return [float(loss) for loss in re.findall(r"held-out loss ([\d.]+)", output)]


@pytest.mark.parametrize("kind", KINDS)
def test_few_lines_change(kind):
    files = [diff for path, diff in DIFFS.items() if path.startswith(kind)]
    assert len(files) == 2
    # A replaced line counts as one, imports as any other.
    changed = sum(
        max(len(marked(hunk, "+")), len(marked(hunk, "-")))
        for diff in files
        for hunk in diff.split("@@\n")
    )
    assert changed <= 5


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_applies(kind, tmp_path):
    app = switched(kind, tmp_path)
    for name in ("server_app", "client_app"):
        source = (app / "plain_app" / f"{name}.py").read_text()
        compile(source, name, "exec")
        assert "FedAvg" not in source


# The GLUE app runs by the legacy interface.
@pytest.mark.parametrize(
    "kind", ["message", pytest.param("legacy", marks=pytest.mark.slow)]
)
def test_a_switched_project_runs(kind, tmp_path):
    output = run(switched(kind, tmp_path), tmp_path, "num-server-rounds=1")
    assert "3 of 3 devices active" in output
    assert len(losses(output)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_plain_project_runs(kind, tmp_path):
    output = run(HERE / kind, tmp_path)
    assert "devices active" not in output
    assert losses(output)[-1] < losses(output)[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_switched_project_runs_and_learns(kind, tmp_path):
    output = run(switched(kind, tmp_path), tmp_path, "num-server-rounds=8")
    assert output.count("3 of 3 devices active") == 8
    assert "beyond their block" not in output
    assert "refused updates" not in output
    assert losses(output)[-1] < 0.8 * losses(output)[0]
