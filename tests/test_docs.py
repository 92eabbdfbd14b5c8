"""The documentation's programs and commands: all are run, and what they print is so.

``python -m tests.test_docs`` writes what programs and commands print into the pages.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from lola_flwr.cli.main import main
from tests.report.sample_runs import sample_run

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = {str(path.relative_to(DOCS)): path for path in sorted(DOCS.rglob("*.md"))}
# Pages a reader works through in order. What stands beside them holds pieces of
# projects and commands for other machines, which have tests of their own.
WALKS = {
    name: path
    for name, path in PAGES.items()
    if name == "index.md" or name.startswith(("concepts/", "how-to/"))
}
# A program, and what it prints where the page shows that.
PROGRAM = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", re.DOTALL)
# A command, and what it prints where the page shows that.
SHOWN = re.compile(r"```bash\n(lola-flwr [^\n]*)\n```\n\n```text\n(.*?)```", re.DOTALL)
# How long this machine took to solve a problem.
SOLVED_IN = re.compile(r" *\d+\.\d ms")
COMMANDS = {
    name: [
        line
        for block in re.findall(r"```bash\n(.*?)```", path.read_text(), re.DOTALL)
        for line in block.splitlines()
        if line and not line.startswith("#")
    ]
    for name, path in WALKS.items()
}
# What takes no longer than a moment; anything else belongs to the slow tests.
QUICK = ("plan", "fleet", "report", "keys")


def programs(text):
    return [match.groups() for match in PROGRAM.finditer(text)]


def run_programs(text):
    """Run a page's programs one after the other; return what each prints."""
    namespace = {"__name__": "docs"}
    printed = []
    for source, _ in programs(text):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(source, "docs", "exec"), namespace)
        printed.append(out.getvalue())
    return printed


def words_of(command):
    words = shlex.split(command.replace(".venv/bin/", ""))
    return words[1:] if words[0] == "lola-flwr" else words


def run_shown(command):
    """Run a command; return what it prints, a refusal as well, as a page shows it."""
    out = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(out),
    ):
        patch.setenv("COLUMNS", "100")
        code = main(words_of(command))
    printed = "\n".join(map(str.rstrip, out.getvalue().splitlines()))
    assert (code != 0) == printed.startswith("error: "), command
    return f"{printed}\n"


def is_quick(command):
    return words_of(command)[0] in QUICK


def link_checkout(directory):
    """Put what commands of the pages name into a directory."""
    for name in ("simulations", "docs"):
        (directory / name).symlink_to(ROOT / name)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A directory as the pages assume it: the apps, and two finished runs."""
    link_checkout(tmp_path)
    for name in ("exact", "crunch"):
        run = sample_run(name)
        directory = tmp_path / "runs" / name
        directory.mkdir(parents=True)
        lines = [record.to_json() + "\n" for record in run.rounds]
        (directory / "rounds.jsonl").write_text("".join(lines))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BROWSER", "true")  # a browser that is content with any page
    return tmp_path


@pytest.mark.parametrize(
    "name", [name for name, path in WALKS.items() if programs(path.read_text())]
)
def test_programs_print_what_the_page_says(name, workplace):
    text = PAGES[name].read_text()
    for (source, says), printed in zip(programs(text), run_programs(text), strict=True):
        assert printed == (says or ""), source


@pytest.mark.parametrize(
    "name", [n for n, c in COMMANDS.items() if any(map(is_quick, c))]
)
def test_quick_commands_work(name, workplace, capsys):
    shown = {command for command, _ in SHOWN.findall(PAGES[name].read_text())}
    for command in filter(is_quick, COMMANDS[name]):
        if command in shown:
            continue  # below, and some of them are refused
        assert main(words_of(command)) == 0, command


@pytest.mark.parametrize(
    "name", [name for name, path in WALKS.items() if SHOWN.search(path.read_text())]
)
def test_commands_print_what_the_page_says(name, workplace):
    for command, says in SHOWN.findall(PAGES[name].read_text()):
        printed = run_shown(command)
        assert SOLVED_IN.sub("", printed) == SOLVED_IN.sub("", says), command


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "name",
    [n for n, commands in COMMANDS.items() if not all(map(is_quick, commands))],
)
def test_all_commands_work(name, workplace):
    glue = os.environ.get("LOLA_GLUE_DIR")
    for command in COMMANDS[name]:
        if "path/to/glue" in command and not glue:
            pytest.skip("LOLA_GLUE_DIR does not name a directory with GLUE's TSV files")
        words = words_of(command.replace("path/to/glue", glue or ""))
        if words[0] == "make":
            subprocess.run(words, cwd=ROOT, check=True)
        else:
            program = [sys.executable, "-m", "lola_flwr.cli.main", *words]
            subprocess.run(program, check=True)


def test_the_notebook_runs():
    notebook = json.loads((DOCS / "notebooks/plan-and-report.ipynb").read_text())
    namespace = {}
    results = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            *body, last = ast.parse("".join(cell["source"])).body
            exec(compile(ast.Module(body, []), "cell", "exec"), namespace)
            expression = compile(ast.Expression(last.value), "cell", "eval")
            results.append(eval(expression, namespace))
    report, (round_s, _, share) = results
    assert report._repr_html_().startswith("<iframe")
    assert [run.name for run in report.runs] == ["exact", "crunch"]
    assert round_s == report.runs[0].rounds[0].round_s
    assert share.sum() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", PAGES[name].read_text()):
        if not link.startswith("http"):
            assert (PAGES[name].parent / link).exists(), link


def write_outputs():
    """Put what the pages' programs and commands print into them."""
    for path in WALKS.values():
        text = SHOWN.sub(
            lambda match: (
                f"```bash\n{match[1]}\n```\n\n```text\n{run_shown(match[1])}```"
            ),
            path.read_text(),
        )
        printed = iter(run_programs(text))

        def filled(match, printed=printed):
            output, (source, says) = next(printed), match.groups()
            shown = "" if says is None else f"\n```text\n{output}```\n"
            return f"```python\n{source}```\n{shown}"

        path.write_text(PROGRAM.sub(filled, text))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
        link_checkout(Path(place))
        write_outputs()
