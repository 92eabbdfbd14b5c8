"""``lola-flwr export``: its mistakes; `tests.export.test_programs` has the rest."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from lola_flwr.cli import export
from lola_flwr.cli.main import main
from lola_flwr.errors import UserError
from lola_flwr.machine import installation


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--blocks", "first"], "--blocks=first must be 'all', or numbers"),
        (["--task", "parsing"], "--task=parsing must be classification or causal"),
        (["--out", "."], "--out . is there, and export overwrites nothing"),
    ],
)
def test_mistakes_are_one_line(capsys, tmp_path, arguments, said):
    given = ["export", "--model", "minilm-l6", "--out", str(tmp_path / "out")]
    assert main([*given, *arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not (tmp_path / "out").exists()


def test_without_executorch_it_says_how_to_install_it(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(
        installation,
        "find_spec",
        lambda name: None if name == "executorch" else find_spec(name),
    )
    assert main(["export", "--model", "minilm-l6", "--out", str(tmp_path / "o")]) == 1
    line = capsys.readouterr().err
    assert "needs executorch" in line and "[export]" in line


def test_blocks_are_numbers_or_all():
    assert export._chosen("all") is None
    assert export._chosen("5, 0,5") == [0, 5]
    with pytest.raises(UserError):
        export._chosen("1,")
