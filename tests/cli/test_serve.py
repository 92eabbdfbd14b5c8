"""``lola-flwr serve`` with nothing to wait for; the testbed kills SuperLinks."""

from __future__ import annotations

import pytest

from lola_flwr.cli.main import FAILED, main
from lola_flwr.deployment import serving
from lola_flwr.simulation import own_superlink
from tests.tree import ROOT

APP = str(ROOT / "simulations" / "quickstart")


def test_a_run_that_cannot_go_on_is_not_started(capsys):
    assert main(["serve", str(ROOT / "simulations" / "glue"), "lan"]) == FAILED
    assert "output-dir=DIRECTORY" in capsys.readouterr().err


@pytest.mark.slow
def test_a_superlink_that_nobody_named_is_not_waited_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    out = f"output-dir={tmp_path / 'out'}"
    assert main(["serve", APP, "nowhere", out]) == FAILED
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.slow
def test_a_superlink_that_is_away_is_waited_for(tmp_path, monkeypatch):
    """Where it stays away the wait is broken off; else it would go on."""
    with own_superlink(tmp_path) as link:
        monkeypatch.setenv("FLWR_HOME", link.environment["FLWR_HOME"])
    said = []

    class EnoughError(Exception):
        pass

    def echo(line):
        said.append(line)
        if sum("starting again" in each for each in said) == 2:
            raise EnoughError

    with pytest.raises(EnoughError):
        serving.serve(
            ROOT / "simulations" / "quickstart", "own", [], echo, first_wait_s=0.1
        )
    assert [line[-6:] for line in said if "starting again" in line] == [
        "0.2 s\n",
        "0.4 s\n",
    ]
