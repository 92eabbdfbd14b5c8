"""Install the wheel beside the oldest and the newest of what it needs, and test it.

``python -m tests.matrix`` has uv make an environment for each row: Python, how versions
are chosen, and what is asked for besides. It installs the wheel with the extras, copies
the tests away from the package's sources, and runs those of the rooms that lean on
SciPy, PyTorch, transformers, peft and Flower. It prints a table, and fails if a row
does, or if no installation can have a lower bound of ``pyproject.toml``.
``--only NAME`` tries some rows anew, and takes the others from before; ``--page FILE``
writes the table into the docs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
EXTRAS = ("simulation", "glue", "adapters", "offline", "quantised", "streaming")
TOOLS = ("hypothesis", "pytest", "pytest-timeout", "pytest-xdist")
# Those that lean most on what is installed.
ROOMS = (
    *("allocation", "cli", "clients", "costs", "d2ft", "device", "model"),
    "strategies",
)
# What tells an environment from another.
SHOWN = ("flwr", "torch", "transformers", "peft", "numpy", "scipy", "datasets", "ray")


@dataclass(frozen=True)
class Environment:
    """An environment to try.

    Parameters
    ----------
    name
        Its name.
    python
        Version of Python.
    asked
        Requirements besides the wheel's own.
    lowest
        Whether the wheel's own requirements are met by the lowest versions that they
        admit, or by today's newest.
    """

    name: str
    python: str
    asked: tuple[str, ...] = ()
    lowest: bool = False


ENVIRONMENTS = (
    Environment("lowest", "3.11", lowest=True),
    Environment("newest", "3.11"),
    Environment("flwr 1.41", "3.11", ("flwr==1.41.*",)),
    Environment("flwr 1.42", "3.11", ("flwr==1.42.*",)),
    Environment("Python 3.12", "3.12"),
    Environment("Python 3.13", "3.13"),
)


@dataclass(frozen=True)
class Tried:
    """What became of an environment: its versions, and pytest's last line."""

    versions: dict[str, str]
    outcome: str
    passed: bool


def main(arguments: Sequence[str] | None = None) -> int:
    """Try the environments; return 1 if one fails."""
    options = _parser().parse_args(arguments)
    places = {e: options.out / e.name.replace(" ", "-") for e in ENVIRONMENTS}
    tried = {}
    for environment, place in places.items():
        row = place / "row.json"
        if not options.only or environment.name in options.only:
            shutil.rmtree(place, ignore_errors=True)
            outcome = _try(environment, _wheel(place), place, options.tests)
            shown = f"{environment.name}: {outcome.outcome} ({place}/tests.log)"
            print(shown, flush=True)
            row.write_text(json.dumps(asdict(outcome)), "utf-8")
        if row.exists():
            tried[environment] = Tried(**json.loads(row.read_text("utf-8")))
    table = "\n".join(_table(tried))
    print(f"\n{table}")
    if options.page:
        text = options.page.read_text("utf-8")
        above, mark, _ = text.partition("| environment |")
        if not mark:
            raise SystemExit(f"{options.page} has no table that begins with {mark!r}")
        options.page.write_text(f"{above}{table}\n", "utf-8")
    return int(not all(row.passed for row in tried.values()))


def _wheel(directory: Path) -> Path:
    _uv("build", "--quiet", "--wheel", "--out-dir", str(directory), str(ROOT))
    (wheel,) = directory.glob("*.whl")
    return wheel


def _try(
    environment: Environment, wheel: Path, place: Path, tests: Sequence[str]
) -> Tried:
    """Make an environment, and run the tests in it."""
    python = str(place / "venv" / "bin" / "python")
    resolution = "lowest-direct" if environment.lowest else "highest"
    install = ("pip", "install", "--quiet", "--python", python)
    try:
        _uv("venv", "--quiet", "--python", environment.python, str(place / "venv"))
        # "Direct" are a project's own requirements, not those of a wheel that is asked
        # for.
        _uv(
            *(*install, "--resolution", resolution),
            *("--requirements", str(ROOT / "pyproject.toml")),
            *(option for extra in EXTRAS for option in ("--extra", extra)),
            *environment.asked,
        )
        _uv(*install, "--no-deps", str(wheel))
        _uv(*install, *TOOLS)
    except subprocess.CalledProcessError as error:
        last = error.stderr.strip().splitlines()[-1]
        return Tried({}, f"cannot be installed: {last}", passed=False)
    listed = json.loads(_uv("pip", "list", "--python", python, "--format", "json"))
    versions = {canonicalize_name(one["name"]): one["version"] for one in listed}
    false = [*_false_bounds(versions)] if environment.lowest else []
    if false:
        return Tried(versions, f"nobody has {', '.join(false)}", passed=False)
    _copy(place / "project")
    log = place / "tests.log"
    with log.open("w") as file:
        done = subprocess.run(
            [
                *(python, "-m", "pytest", "-n", "2", "--dist", "loadfile"),
                *("--tb=short", *(tests or [f"tests/{room}" for room in ROOMS])),
            ],
            cwd=place / "project",
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    *_, last = filter(str.strip, log.read_text("utf-8").splitlines())
    outcome, *_ = last.strip("= ").split(" in ")
    return Tried(versions, outcome, passed=done.returncode == 0)


def _false_bounds(lowest: Mapping[str, str]) -> Iterator[str]:
    """Give the lower bounds below the lowest versions that can be had."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = [project["optional-dependencies"][extra] for extra in EXTRAS]
    for line in chain(project["dependencies"], *extras):
        wanted = Requirement(line)
        found = lowest.get(canonicalize_name(wanted.name))
        bounds = [b.version for b in wanted.specifier if b.operator == ">="]
        asked = wanted.marker is None or wanted.marker.evaluate()
        if found and asked and not SpecifierSet(f"=={bounds[0]}.*").contains(found):
            yield f"{wanted.name} {bounds[0]} (but {found})"


def _copy(project: Path) -> None:
    """Copy what tests need, and nothing that could stand in for the wheel."""
    hidden = shutil.ignore_patterns("__pycache__")
    for name in ("tests", "simulations", "docs"):
        shutil.copytree(ROOT / name, project / name, ignore=hidden)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, project)


def _table(tried: Mapping[Environment, Tried]) -> Iterator[str]:
    yield f"| environment | Python | {' | '.join(SHOWN)} | tests |"
    yield "|" + " --- |" * (len(SHOWN) + 3)
    for environment, row in tried.items():
        versions = (row.versions.get(name, "").partition("+")[0] for name in SHOWN)
        cells = (environment.name, environment.python, *versions, row.outcome)
        yield f"| {' | '.join(cells)} |"


def _uv(*arguments: str) -> str:
    return subprocess.run(
        [sys.executable, "-m", "uv", *arguments],
        check=True,
        capture_output=True,
        text=True,
    ).stdout


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__)
    add = parser.add_argument
    add(
        "--only",
        nargs="+",
        choices=[e.name for e in ENVIRONMENTS],
        metavar="NAME",
        help="names of the environments to try",
    )
    add("--tests", nargs="+", default=(), help="other tests", metavar="PATH")
    add(
        "--out", type=Path, default=ROOT / "runs" / "matrix", help="where they are made"
    )
    add("--page", type=Path, help="a page of the docs whose last table this is")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
