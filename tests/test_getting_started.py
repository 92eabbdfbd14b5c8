"""Getting started, as a new user does it: the page's data, commands and programs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter

import pytest

from tests.test_docs import DOCS, link_checkout, run_programs, words_of
from tests.test_readme import check_words

PAGE = (DOCS / "getting-started.md").read_text()
# A program or a command, and what it prints where the page shows that.
STEPS = re.findall(
    r"```(python|bash|py)\n(.*?)```\n(?:\n```text\n(.*?)```)?", PAGE, re.DOTALL
)
COMMANDS = [text.strip() for kind, text, _ in STEPS if kind == "bash"]
# What a test of the checkout that it is in has done already.
DONE = ["make venv", ". .venv/bin/activate"]


def test_the_data_are_what_the_app_takes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_programs(PAGE)
    lines = (tmp_path / "messages.jsonl").read_text().splitlines()
    examples = [json.loads(line) for line in lines]
    assert all(set(example) == {"text", "label"} for example in examples)
    assert len(Counter(example["label"] for example in examples)) == 3


def test_commands_are_valid():
    assert COMMANDS[: len(DONE)] == DONE
    (run,) = [words_of(line) for line in COMMANDS if "simulate" in line]
    out = run.index("--out")
    check_words([*run[1:out], *run[out + 2 :]])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_ends_with_an_adapter_that_is_of_use(tmp_path, monkeypatch):
    link_checkout(tmp_path)
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("BROWSER", "true")
    for kind, text, says in STEPS:
        if text.strip() in DONE:
            continue
        program = ["-m", "lola_flwr.cli.main", *words_of(text)]
        result = subprocess.run(
            [sys.executable, *(program if kind == "bash" else ["-c", text])],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, (text, result.stdout[-2000:], result.stderr)
        assert not says or result.stdout == says, text
    last = (tmp_path / "runs/messages/rounds.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["metrics"]["accuracy"] > 0.9
