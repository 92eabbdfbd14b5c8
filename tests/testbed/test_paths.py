"""Every path of a command on a full, a read-only and a wrong file system: one line.

File systems are mounted in a mount namespace of their own, which needs root.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lola_flwr.run.records import RoundRecord
from lola_flwr.system.fleet_file import fleet_toml, generate_fleet
from tests.reliability.test_resume import records
from tests.reliability.tiny_run import run

ROOT = Path(__file__).parents[2]
GLUE = ROOT / "simulations" / "glue"
MOUNTS = """
mount -t tmpfs -o size=64k none full
head -c 128k /dev/zero > full/filling 2> /dev/null || true
mount -t tmpfs -o size=64k none fixed
cp -r run fixed
mount -o remount,ro fixed
"""
SIMULATE = f"simulate {GLUE} --devices 2 rounds=1 --engine process --plain"

# Command, and what its one line has to name. In "full" there is no room, "fixed" is
# read-only, "file" is a file, "directory" is a directory.
COMMANDS = [
    *(
        (f"{command} {place}{name}", place)
        for command, name in (
            ("report run --out", ""),
            ("fleet generate 30 --out", ""),
            ("profile --out", ""),
        )
        for place in ("full/new", "fixed/new", "file/new", "directory")
        # A measurement takes minutes before it finds the disk full.
        if (command, place) != ("profile --out", "full/new")
    ),
    ("report fixed/run", "fixed/run/report.html"),
    ("report nowhere", "nowhere"),
    ("report file", "file"),
    ("report as-rounds", "as-rounds"),
    ("report as-description", "as-description/run.json"),
    *(
        (f"{command} {place}", place)
        for command in ("plan --fleet", "fleet show", "plan --model")
        for place in ("nowhere", "directory", "file")
    ),
    ("plan --fleet file/new", "file/new"),
]
RUNS = [
    *((f"--out {place}/new", f"{place}/new") for place in ("full", "fixed", "file")),
    ("--out fixed", "fixed/lock"),
    ("--out file", "file"),
    ("--out as-lock", "as-lock/lock"),
    ("--out as-rounds", "as-rounds/rounds.jsonl"),
    ("--out as-json", "as-json/run.json"),
    ("--out as-checkpoints", "as-checkpoints/checkpoints"),
    ("--out new model=directory", "directory"),
    ("--out new model=file", "file"),
    ("--out new model=./nowhere", "nowhere"),
    ("--out new --fleet directory", "directory"),
    ("--out new --fleet nowhere", "nowhere"),
    ("--out new --engine ray --home file", "file"),
    ("--out new --engine ray --home fixed", "fixed"),
]

pytestmark = [
    pytest.mark.testbed,
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(shutil.which("unshare") is None, reason="no unshare here"),
]


@pytest.fixture
def place(tmp_path):
    for name in ("full", "fixed", "directory", "run", "as-lock/lock"):
        (tmp_path / name).mkdir(parents=True)
    for name in (
        "as-rounds/rounds.jsonl",
        "as-description/run.json",
        "as-json/run.json",
    ):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "as-checkpoints").mkdir()
    for name in ("file", "as-checkpoints/checkpoints"):
        (tmp_path / name).write_text("mine\n")
    (tmp_path / "fleet.toml").write_text(fleet_toml(generate_fleet(2)))
    for name in ("run", "as-description"):
        line = f"{RoundRecord(1, 2, 3.0).to_json()}\n"
        (tmp_path / name / "rounds.jsonl").write_text(line)
    return tmp_path


def in_namespace(place, command):
    script = f"set -e\ncd {place}\n{MOUNTS}\n{command}"
    return subprocess.run(
        ["unshare", "-m", "bash", "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def lola(arguments):
    code = "import sys; from lola_flwr.cli.main import main; sys.exit(main())"
    return f"{sys.executable} -c '{code}' {arguments}"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [*COMMANDS, *((f"{SIMULATE} {more}", named) for more, named in RUNS)],
)
def test_one_line(place, arguments, named):
    done = in_namespace(place, lola(arguments))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert named in done.stderr
    assert "Traceback" not in done.stdout
    assert (place / "file").read_text() == "mine\n"


def test_nothing_half_is_left_where_there_is_no_room(place):
    done = in_namespace(place, f"{lola('fleet generate 30 --out full/new')} || ls full")
    assert done.stdout.split() == ["filling"]


# From the second round on there is nothing of the run but a read-only file system.
LOSES_ITS_DISK = """
import subprocess, sys
from pathlib import Path
from tests.reliability.tiny_run import run

def on_plan(server_round):
    if server_round == 2:
        command = "mount -t tmpfs -o ro none kept/run"
        subprocess.run(command.split(), check=True)

run(Path("kept/run"), num_rounds=3, on_plan=on_plan)
"""


def test_a_run_that_loses_its_directory_is_gone_on_with(place):
    (place / "kept").mkdir()
    (place / "program.py").write_text(LOSES_ITS_DISK)
    done = in_namespace(
        place,
        "mount -t tmpfs -o size=64m none kept; "
        f"{sys.executable} program.py 2> said || true; "
        "umount kept/run; cp -r kept/run left",
    )
    assert done.returncode == 0, done.stderr
    said = (place / "said").read_text().splitlines()[-1]
    assert "UserError: " in said
    assert "cannot be written: Read-only file system" in said
    assert len(records(place / "left")) == 1
    run(place / "left", num_rounds=3)
    run(place / "whole", num_rounds=3)
    left, whole = records(place / "left"), records(place / "whole")
    # The first round was computed in another process, which rounds differently.
    assert [record["server_round"] for record in left] == [1, 2, 3]
    for one, other in zip(left, whole, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)
        assert [block["device"] for block in one["blocks"]] == [
            block["device"] for block in other["blocks"]
        ]
