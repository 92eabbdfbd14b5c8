"""What a worker and its client need to be installed."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lola_flwr.deployment.shim import resident
from lola_flwr.deployment.worker import ask_worker
from tests.deployment.workers import TOY, assignment, wait_until

pytestmark = pytest.mark.usefixtures("toy_app")


ROOT = Path(__file__).parents[2]


def test_worker_needs_no_flower_and_the_client_no_torch():
    program = (
        "import sys\n"
        "import {module}\n"
        "wrong = {unwanted} & set(sys.modules)\n"
        "sys.exit(', '.join(wrong) or 0)"
    )
    for module, unwanted in (
        ("lola_flwr.deployment.serve_worker", "{'flwr', 'torch', 'scipy'}"),
        ("lola_glue.client_app", "{'torch', 'transformers', 'scipy', 'datasets'}"),
    ):
        code = program.format(module=module, unwanted=unwanted)
        result = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_python_310_has_all_that_a_device_imports():
    """As a Jetson's; the types of the standard library tell what came later."""
    code = (
        "import sys, lola_glue.device, lola_flwr.cli.profile\n"
        "import lola_flwr.deployment.serve_worker\n"
        "ours = [m for n, m in sys.modules.items() if n.startswith('lola_')]\n"
        "print(*(m.__file__ for m in ours))"
    )
    program = [sys.executable, "-c", code]
    files = subprocess.check_output(
        program, cwd=ROOT / "simulations" / "glue", text=True
    ).split()
    assert len(files) > 50
    mypy = [sys.executable, "-m", "mypy", "--python-version=3.10"]
    checked = subprocess.run(
        [*mypy, "--follow-imports=silent", "--cache-dir=/dev/null", *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert "checked" in checked.stdout, checked.stdout
    lacking = ("[attr-defined]", "[name-defined]", "[import-not-found]")
    missing = [x for x in checked.stdout.splitlines() if x.endswith(lacking)]
    # Only those who check types import this one.
    assert [line for line in missing if '"Self"' not in line] == []
    for file in files:
        for statement in ast.parse(Path(file).read_text()).body:
            if isinstance(statement, ast.ImportFrom) and statement.module == "typing":
                assert "Self" not in {name.name for name in statement.names}, file


@pytest.mark.slow
def test_the_worker_runs_in_python_310(tmp_path, path):
    """As on a Jetson, whose PyTorch is for the Python of its system."""
    candidates = [
        shutil.which("python3.10") or "",
        *map(str, Path.home().glob(".pyenv/versions/3.10.*/bin/python3.10")),
    ]
    python = next(filter(_is_python_310, candidates), None)
    if python is None:
        pytest.skip("there is no Python 3.10 here")
    if subprocess.run([python, "-m", "venv", tmp_path / "venv"]).returncode:
        pytest.skip("this Python 3.10 makes no environments")
    python = str(tmp_path / "venv" / "bin" / "python")
    installed = subprocess.run([python, "-m", "pip", "install", "-q", "numpy<3"])
    if installed.returncode:
        pytest.skip("numpy cannot be installed here")
    # The package as it is installed, without what it depends on.
    packages = tmp_path / "packages"
    shutil.copytree(ROOT / "lola_flwr", packages / "lola_flwr")
    wrapper = tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\nPYTHONPATH={packages} exec {python} "$@"\n')
    wrapper.chmod(0o700)
    node_config = {"worker": str(path), "worker-python": str(wrapper)}
    flower = SimpleNamespace(
        run_id=1, node_id=7, node_config=node_config, run_config={}
    )
    values = {"w": np.ones(3, "f4")}
    update = resident(TOY)(flower).train(assignment(), values)
    np.testing.assert_array_equal(update.arrays["w"], np.full(3, 2, "f4"))
    exe = Path(f"/proc/{update.num_examples}/exe").resolve()
    assert "3.10" in exe.name
    ask_worker(path, "stop")
    wait_until(lambda: not path.exists())


def _is_python_310(python):
    # pyenv's own `python3.10` is there without such a Python.
    return python and not subprocess.run([python, "-c", ""]).returncode
