"""``lola-flwr doctor``: it looks at the real machine, and at broken ones."""

from __future__ import annotations

import json
import sys
from importlib.metadata import metadata, version

import pytest
from packaging.requirements import Requirement

from lola_flwr.cli import diagnosis, installed
from lola_flwr.cli.installed import own_modules, versions_of
from lola_flwr.cli.main import main
from lola_flwr.machine.installation import install_command
from tests.tree import PACKAGE, modules


def test_a_quick_look(capsys):
    assert main(["doctor", "--quick", "--json"]) == 0
    findings = {f["subject"]: f for f in json.loads(capsys.readouterr().out)}
    assert findings["packages"]["status"] == "ok"
    assert "torch" in findings["packages"]["says"]
    assert "SuperLink" not in findings
    assert main(["doctor", "--quick"]) == 0
    assert f"✓ {'Python':<17}" in capsys.readouterr().out


def test_every_extra_is_looked_at(capsys):
    assert main(["doctor", "--quick", "--json"]) == 0
    subjects = {finding["subject"] for finding in json.loads(capsys.readouterr().out)}
    extras = metadata("lola-flwr").get_all("Provides-Extra")
    assert {f"extra {extra}" for extra in extras} <= subjects


@pytest.mark.slow
def test_everything_starts():
    assert [f for f in diagnosis.packages() if f.status == "problem"] == []
    assert diagnosis.superlink().status == "ok"
    assert diagnosis.ray().status == "ok"


def test_a_superlink_that_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    found = diagnosis.superlink()
    assert found.status == "problem"
    assert "flower-superlink is neither beside" in found.says


def test_a_ray_that_does_not_start(monkeypatch, tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho first\necho no module named ray\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    found = diagnosis.ray()
    assert (found.status, found.says) == ("problem", "no module named ray")


def test_versions_are_tested_or_not_or_missing():
    wanted = ["numpy<1", "no-such-package", "rich"]
    found = versions_of(map(Requirement, wanted))
    assert found.missing == ("no-such-package",)
    assert found.not_tested == (f"numpy {version('numpy')} (<1)",)
    assert found.tested == (f"rich {version('rich')}",)
    assert str(found).startswith("missing: no-such-package; not tested: numpy")


@pytest.mark.skipif(not PACKAGE.exists(), reason="a wheel is tested without its tree")
def test_own_modules_are_those_of_the_tree():
    assert own_modules() == [*modules()]


def test_a_module_may_need_what_an_extra_brings_and_nothing_else(tmp_path, monkeypatch):
    (tmp_path / "of_an_extra.py").write_text("import not_here.part")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert installed.why_not_imported(["of_an_extra"], ["not-here"]) is None
    for lacking in ([], ["other"]):
        why = installed.why_not_imported(["of_an_extra"], lacking)
        assert why.startswith("of_an_extra: ModuleNotFoundError: No module named 'not")


class TestParts:
    @pytest.fixture
    def requires(self, monkeypatch):
        def of(*wanted):
            found = [*map(Requirement, wanted)]
            monkeypatch.setattr(diagnosis, "requirements_of", lambda *_: found)

        monkeypatch.setattr(diagnosis, "extras_of", lambda _: ["more"])
        monkeypatch.setattr(diagnosis, "own_modules", lambda: ["json"])
        return of

    @pytest.fixture
    def broken(self, tmp_path, monkeypatch):
        """Let what `tomli-w` gives be a module of some text."""

        def with_text(text):
            (tmp_path / "broken_one.py").write_text(text)
            monkeypatch.setenv("PYTHONPATH", str(tmp_path))
            monkeypatch.setattr(
                installed, "packages_distributions", lambda: {"broken_one": ["tomli_w"]}
            )

        return with_text

    def test_what_is_missing_comes_with_what_mends_it(self, requires):
        requires("no-such-package")
        core, _, extra = diagnosis.packages()
        assert (core.status, core.advice) == ("problem", install_command())
        assert (extra.status, extra.advice) == ("note", install_command("more"))

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("import os; os.abort()", "broken_one: Python crashed, SIGABRT"),
            ("import no_such", "broken_one: ModuleNotFoundError: No module named"),
            ("import sys; print('x'); sys.exit(3)", "broken_one: Python ended with co"),
        ],
    )
    def test_what_is_there_but_broken(self, requires, broken, text, says):
        requires("tomli-w")
        broken(text)
        core = next(diagnosis.packages())
        assert core.status == "problem"
        assert core.says.startswith(f"cannot be imported, {says}")
        assert core.advice.endswith("--upgrade --upgrade-strategy eager")
        # Looking at versions alone does not see it.
        assert next(diagnosis.packages(start=False)).status == "ok"

    def test_not_installed(self):
        (found,) = diagnosis.packages("no-such-package")
        assert found.status == "problem"


@pytest.mark.parametrize(
    ("script", "status", "says"),
    [
        ("echo 'accelerator: A100 (CUDA)'", "ok", "A100 (CUDA)"),
        ("echo accelerator:", "note", "sees none; training uses the CPU"),
        ("echo No module named torch; exit 1", "problem", "No module named torch"),
        ("kill -SEGV $$", "problem", "PyTorch: exit code -11"),
    ],
)
def test_gpus(monkeypatch, tmp_path, script, status, says):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/bash\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    found = diagnosis.gpu()
    assert found.status == status
    assert says in found.says


def test_a_hub_out_of_reach(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    found = diagnosis.hub()
    assert found.status == "note"
    assert "minilm-l6" in found.advice


def test_no_tc(monkeypatch):
    monkeypatch.setattr(diagnosis.shutil, "which", lambda *_, **__: None)
    assert "iproute2" in diagnosis.traffic_control().advice


def test_a_problem_fails_the_command(monkeypatch, capsys):
    broken = diagnosis.Finding("Ray", "problem", "does not start", "install it")
    monkeypatch.setattr(diagnosis, "diagnose", lambda *, start: iter([broken]))
    assert main(["doctor"]) == 1
    shown = capsys.readouterr()
    assert "→ install it" in shown.out
    assert shown.err == "error: These need attention: Ray.\n"
