"""``lola-flwr doctor``: it looks at the real machine, and at broken ones."""

from __future__ import annotations

import json
import sys
from importlib.metadata import metadata

import pytest
from packaging.requirements import Requirement

from lola_flwr.cli import diagnosis
from lola_flwr.cli.main import main


def test_a_quick_look(capsys):
    assert main(["doctor", "--quick", "--json"]) == 0
    findings = {f["subject"]: f for f in json.loads(capsys.readouterr().out)}
    assert findings["packages"]["status"] == "ok"
    assert "torch" in findings["packages"]["says"]
    assert "SuperLink" not in findings
    assert main(["doctor", "--quick"]) == 0
    assert f"✓ {'Python':<17}" in capsys.readouterr().out


def test_extras_that_are_looked_at_exist():
    assert {*diagnosis._EXTRAS} <= {*metadata("lola-flwr").get_all("Provides-Extra")}


@pytest.mark.slow
def test_everything_starts():
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


def test_versions_out_of_range_and_missing():
    wanted = [
        Requirement("numpy<1"),
        Requirement("no-such-package"),
        Requirement("rich"),
    ]
    found = diagnosis._versions("packages", wanted, "problem", "do this")
    assert found.status == "problem"
    assert "is not <1, no-such-package is missing" in found.says
    assert found.advice == "do this"


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
