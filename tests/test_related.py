"""The page of related systems: every one has a row, and what rows say is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from lola_flwr.cli.app_config import read_overrides
from lola_flwr.simulation.flower_app import read_app
from lola_glue.config import GlueConfig
from simulations.compare.__main__ import METHODS, read_methods

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "related.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in TEXT.splitlines()
    if line.startswith("| ") and not line.startswith(("| #", "| system"))
]
SHOWN = [
    (row[-3].strip(), words)
    for row in ROWS
    for words in re.findall(r"`([^`]+)`", row[-1])
    if not words.startswith("lola-flwr") and words != "loss_function"
]
CONTENDERS = METHODS.with_name("contenders.toml")


def test_every_system_has_a_row():
    numbers = [int(row[0]) for row in ROWS if row[0].isdecimal()]
    assert sorted(numbers) == list(range(1, 77))


def test_what_works_says_by_what():
    for row in ROWS:
        if "works" in row[:-1]:
            assert "`" in row[-1], row
        assert row[-1], row


@pytest.mark.parametrize(("system", "words"), SHOWN)
def test_what_a_row_says_is_there(system, words):
    name = words.removeprefix("compare: ")
    if name != words:
        assert name in {**read_methods(METHODS), **read_methods(CONTENDERS)}
        return
    app = read_app(ROOT / "simulations" / "glue")
    overrides = read_overrides(app, shlex.split(words))
    assert overrides
    assert GlueConfig.from_run_config({**app.config, **overrides})
