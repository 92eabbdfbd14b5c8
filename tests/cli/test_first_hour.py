"""The ten commonest mistakes of a first hour: one line each, before anything starts.

Neither Flower nor PyTorch is imported to say it, so it takes a moment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from lola_flwr.cli.main import FAILED, MISUSED, main
from lola_flwr.errors import UserError
from lola_flwr.simulation.flower_app import FlowerApp, check_start, read_app
from lola_flwr.system.fleet_file import fleet_toml, generate_fleet

SIMULATIONS = Path(__file__).parents[2] / "simulations"
GLUE, QUICKSTART, VISION = (
    str(SIMULATIONS / name) for name in ("glue", "quickstart", "vision")
)
SIX, QUICK_SIX = (f"simulate {app} --devices 6" for app in (GLUE, QUICKSTART))

# Mistake, command, exit code, and the way out that its line names.
MISTAKES = [
    ("no app", "simulate nowhere", FAILED, "give the app's directory"),
    ("no app", "simulate no-app", FAILED, "give the app's directory"),
    ("key as option", f"{SIX} --rounds 3", MISUSED, "written without dashes: rounds=3"),
    ("key as option", f"{SIX} --out rounds=3", FAILED, "give it a directory"),
    ("key mistyped", f"{SIX} rouns=3", FAILED, "Did you mean 'rounds'?"),
    ("wrong type", f"{SIX} rounds=ten", FAILED, "a whole number, as in rounds=40"),
    ("no model", f"{SIX} model=./modle", FAILED, "use model='minilm-l6'"),
    ("no model", f"{SIX} model=no-app", FAILED, "no config.json"),
    ("no model", f"{SIX} model=random:bert", FAILED, "random:roberta-base"),
    ("no data", f"{SIX} task=cola", FAILED, 'data-dir="..."'),
    ("no data", f"{SIX} task=cola data-dir=no-app", FAILED, "Put CoLA's TSV files"),
    ("no data", f"{SIX} task=sst-2 data-dir=glue", FAILED, "Put the task's training"),
    ("no model", f"{QUICK_SIX} model=no-app", FAILED, "no config.json"),
    ("no data", f"{QUICK_SIX} data=mine.tsv", FAILED, "text and label"),
    ("too few devices", f"{SIX} devices-per-block=2 backups=1", FAILED, "Add devices"),
    ("too little memory", f"simulate {GLUE} --fleet mb.toml", FAILED, "(in bytes)"),
    ("no such pair", f"{SIX} method=fedavg-full backups=2", FAILED, "set it to 0"),
    ("extra missing", f"{SIX} tuning=lora", FAILED, "[adapters]"),
    ("extra missing", QUICK_SIX, FAILED, "[adapters]"),
]


def fleet_of(number, *, memory_bytes):
    fleet = generate_fleet(number)
    return fleet_toml([replace(device, memory_bytes=memory_bytes) for device in fleet])


@pytest.fixture
def directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # For all that can be told, peft is not installed.
    monkeypatch.setitem(sys.modules, "peft", None)
    files = {
        "no-app/pyproject.toml": "[project]\nname = 'x'\n",
        "mb.toml": fleet_of(6, memory_bytes=4e6),
        "glue/SST-2/dev.tsv": "sentence\tlabel\nfine\t1\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.fixture
def no_flower(directory, monkeypatch):
    """Leave Flower's programs out of reach: a run that gets so far fails at once."""
    monkeypatch.setattr(sys, "executable", str(directory / "python"))
    monkeypatch.setenv("PATH", str(directory))


def test_there_are_ten():
    assert len(dict.fromkeys(mistake for mistake, *_ in MISTAKES)) == 10


@pytest.mark.parametrize(("mistake", "command", "code", "way_out"), MISTAKES)
def test_one_line_and_nothing_started(
    directory, no_flower, mistake, command, code, way_out, capsys
):
    before = sorted(directory.rglob("*"))
    assert main(command.split()) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert way_out in shown.err
    # Flower's home, and whatever a SuperLink or Ray would leave there.
    assert sorted(directory.rglob("*")) == before


def test_nothing_heavy_is_imported_to_say_it(directory):
    program = (
        "import json, sys\n"
        "from lola_flwr.cli.main import main\n"
        "sys.modules['peft'], sys.executable = None, 'nowhere/python'\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    assert main(words) in (1, 2)\n"
        "    heavy = {'torch', 'flwr', 'ray', 'transformers'} & set(sys.modules)\n"
        "    assert not heavy, (words, heavy)\n"
    )
    commands = json.dumps([command.split() for _, command, *_ in MISTAKES])
    out_of_reach = {**os.environ, "PATH": str(directory)}
    subprocess.run(
        [sys.executable, "-c", program, commands], check=True, env=out_of_reach
    )


class TestOnTheModel:
    """What only the model itself tells, which takes PyTorch."""

    TINY = ("simulate", GLUE, "model=random:roberta-tiny")

    @pytest.mark.parametrize(
        ("words", "way_out"),
        [
            (("--fleet", "tight.toml"), "No device can hold block 0"),
            (
                ("--devices", "4", "devices-per-block=2", "backups=1"),
                "Too few devices: 4 for 4 blocks that need 8",
            ),
        ],
    )
    def test_mistakes(self, directory, capsys, words, way_out):
        (directory / "tight.toml").write_text(fleet_of(4, memory_bytes=6e6))
        assert main([*self.TINY, *words]) == FAILED
        shown = capsys.readouterr().err
        assert way_out in shown
        assert shown.count("\n") == 1
        # Devices' processes were about to load the model; nothing has run.
        assert [path.name for path in (directory / "runs").iterdir()] == ["flwr-home"]
        assert not psutil.Process().children()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"patch-size": 5}, "image-size=32 is no multiple of patch-size=5"),
            ({"data-dir": "nowhere"}, "give a folder with a sub-folder of images"),
        ],
    )
    def test_images(self, directory, changes, message):
        app = read_app(Path(VISION))
        with pytest.raises(UserError, match=message):
            check_start(app, {**app.config, **changes}, 4)()

    @pytest.mark.parametrize(
        ("lines", "message"),
        [
            (("text\tsays", "fine\tgood"), "no column label .it has text, says.;"),
            (("text\tlabel", "fine\tgood", "dull\t"), "no label in 1 of 2 .* number 2"),
            (("text\tlabel", "fine\tgood", "nice\tgood"), "has one label, 'good'"),
        ],
    )
    def test_examples(self, tmp_path, lines, message):
        (tmp_path / "own.tsv").write_text("\n".join(lines))
        app = read_app(Path(QUICKSTART))
        with pytest.raises(UserError, match=message):
            check_start(app, {**app.config, "data": str(tmp_path / "own.tsv")}, 6)()

    @pytest.mark.slow
    @pytest.mark.parametrize("path", [VISION, QUICKSTART])
    def test_apps_that_can_start(self, path):
        app = read_app(Path(path))
        check_start(app, app.config, 3)()

    @pytest.mark.parametrize(
        "changes",
        [
            pytest.param({"method": "fedavg-full"}, marks=pytest.mark.slow),
            pytest.param({"method": "d2ft"}, marks=pytest.mark.slow),
            {"selector": "ist", "selector-options": "count=1"},
        ],
    )
    def test_what_can_start(self, changes):
        app = read_app(Path(GLUE))
        config = {**app.config, "model": "random:roberta-tiny", **changes}
        check_start(app, config, 4)()


def test_an_app_that_offers_no_check_is_taken_to_start(tmp_path):
    check_start(FlowerApp(tmp_path, "app", {}), {}, 1)()


@pytest.mark.parametrize(
    ("check", "message"),
    [
        ("no_such:check", "check='no_such:check' .* cannot be imported"),
        ("checks:fails", "check='checks:fails' .* fails: KeyError: 'a'"),
        ("checks:refuses", "^put it right$"),
        ("checks:refuses_on_the_model", "^put it right$"),
    ],
)
def test_checks_of_an_apps_own(tmp_path, check, message):
    (tmp_path / "checks.py").write_text(
        "from lola_flwr.errors import UserError\n"
        "def fails(config, num_devices): return config['a']\n"
        "def refuses(*_): raise UserError('put it right')\n"
        "def refuses_on_the_model(config, num_devices): return refuses\n"
    )
    app = FlowerApp(tmp_path, "app", {}, check=check)
    with pytest.raises(UserError, match=message):
        check_start(app, {}, 1)()
    sys.modules.pop("checks", None)
