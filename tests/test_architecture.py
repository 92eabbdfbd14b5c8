"""The house: its layers hold, and docs/architecture.md says what they are.

``python -m tests.test_architecture`` writes them into the page.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import shutil
import subprocess
import sys
import textwrap
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lola_flwr.run.tracking import TRACKERS
from tests.tree import PACKAGE, ROOT, modules

PAGE = ROOT / "docs" / "architecture.md"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
CONTRACTS = PYPROJECT["tool"]["importlinter"]["contracts"]
LAYERS = next(c["layers"] for c in CONTRACTS if c["type"] == "layers")
# Who may import Flower, and who PyTorch.
MAY_IMPORT = {
    contract["protected_modules"][0]: contract["allowed_importers"]
    for contract in CONTRACTS
    if contract["type"] == "protected"
}


def is_in(module, packages):
    return any(module == p or module.startswith(f"{p}.") for p in packages)


def quoted_layers():
    return "\n".join(LAYERS)


def quoted_doors():
    return "\n".join(
        textwrap.fill(
            f"{library}: "
            + ", ".join(name.removeprefix("lola_flwr.") for name in importers),
            width=88,
            subsequent_indent=" " * len(f"{library}: "),
        )
        for library, importers in MAY_IMPORT.items()
    )


def filled(page):
    """Return the page with the contracts in its first two blocks."""
    quotes = iter((quoted_layers(), quoted_doors()))
    return re.sub(
        r"```text\n.*?```",
        lambda _: f"```text\n{next(quotes)}\n```",
        page,
        count=2,
        flags=re.DOTALL,
    )


def test_the_page_quotes_the_contracts():
    page = PAGE.read_text(encoding="utf-8")
    assert page == filled(page), "python -m tests.test_architecture writes them"


def test_the_page_has_every_room():
    page = PAGE.read_text(encoding="utf-8")
    table = page[page.index("| room |") : page.index("## One round")]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("|")]
    named = {name.rstrip("/") for cell in cells for name in re.findall("`(.+?)`", cell)}
    flat = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    rooms = {
        name.removeprefix("lola_flwr.").replace(".", "/")
        for name, path in modules().items()
        if path.name == "__init__.py" and name != "lola_flwr"
    }
    assert named == rooms | flat


def test_the_page_names_files_that_exist():
    page = PAGE.read_text(encoding="utf-8")
    walk = page[page.index("## One round") : page.index("## Words")]
    names = re.findall(r"`([\w/]+(?:\.py|/))`", walk)
    assert len(names) > 25
    assert [name for name in names if not (PACKAGE / name).exists()] == []


def test_the_house_stays_small():
    flat = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert len(flat) <= 6
    rooms = [path for path in modules().values() if path.name == "__init__.py"]
    assert len(rooms) <= 27


def lint_imports(directory):
    """Return the exit code, and the violations that are told."""
    program = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [program, "--no-cache"], cwd=directory, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def test_the_contracts_hold():
    code, said = lint_imports(ROOT)
    assert code == 0, said


def test_the_contracts_see_all_of_the_house(tmp_path):
    """A violation of each, in linked directories, too, and within functions."""
    for name in ("lola_flwr", "clients", "strategies"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    planted = {
        "clients/node.py": "import torch",
        "strategies/deadline.py": "from lola_flwr.clients import node",
        "strategies/presence.py": "from torch import nn",
        "lola_flwr/allocation/edges.py": "from lola_flwr.system import channel",
        "lola_flwr/cli/plan.py": "def f():\n    import lola_flwr.clients.profiles",
        "lola_flwr/device/store.py": "import lola_flwr.server.absences",
        "lola_flwr/machine/heap.py": "from flwr.common.logger import log",
        "lola_flwr/planning/solution.py": "def f():\n    import simulations.run",
        "lola_flwr/wire/codec.py": "import lola_flwr.wire.payload",
        "lola_flwr/new_room/__init__.py": "",
    }
    for name, statement in planted.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        with (tmp_path / name).open("a", encoding="utf-8") as file:
            file.write(f"\n\n{statement}\n")
    code, said = lint_imports(tmp_path)
    assert code == 1
    for violation in (
        "lola_flwr.clients.node -> torch",
        "lola_flwr.strategies.deadline -> lola_flwr.clients.node",
        "lola_flwr.strategies.presence -> torch",
        "lola_flwr.allocation.edges -> lola_flwr.system.channel",
        "lola_flwr.cli.plan -> lola_flwr.clients.profiles",
        "lola_flwr.device.store -> lola_flwr.server.absences",
        "lola_flwr.machine.heap -> flwr",
        "lola_flwr.planning.solution -> simulations",
        "No cycles are allowed in lola_flwr.wire",
        "lola_flwr.new_room",
    ):
        assert violation in said, violation


def test_who_needs_neither_torch_nor_flower_brings_in_neither():
    """Not even through what they import; `server` as a whole steps the optimizer."""
    doors = [*MAY_IMPORT["flwr"], *MAY_IMPORT["torch"]]
    light = [m for m in modules() if not is_in(m, [*doors, "lola_flwr.server"])]
    assert {"lola_flwr.cli.plan", "lola_flwr.wire.codec", "lola_flwr.planning"} <= {
        *light
    }
    assert brought_in(light, {"torch", "flwr", "transformers", "ray"}) == {}
    # And without the strategies nothing brings Flower in.
    rest = [m for m in modules() if not is_in(m, MAY_IMPORT["flwr"])]
    assert brought_in(rest, {"flwr", "ray"}) == {}


def brought_in(names, heavy):
    """Import modules one after the other; return which brought heavy ones in first."""
    program = (
        "import importlib, json, sys\n"
        "names, heavy = map(json.loads, sys.argv[1:])\n"
        "found = {}\n"
        "for name in names:\n"
        "    importlib.import_module(name)\n"
        "    for module in set(heavy) & set(sys.modules) - set(found):\n"
        "        found[module] = name\n"
        "print(json.dumps(found))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(names), json.dumps([*heavy])],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def declared(lines):
    return {canonicalize_name(Requirement(line).name) for line in lines}


def imported(tree):
    """Return the top-level names that a module imports, and those at once."""
    functions = [
        node
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    later = {inner for function in functions for inner in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0], node not in later
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.partition(".")[0], node not in later


def test_what_is_imported_is_declared():
    """At once: by the package itself, so that all of it can be imported without extras.

    Apps and tests, which happen to be on a checkout's path, are not. Tuners of our own
    are classes of peft, and imported once it is known to be there.
    """
    always = declared(PROJECT["dependencies"])
    extras = PROJECT["optional-dependencies"]
    anyhow = always.union(*(declared(extras[x]) for x in extras if x != "dev"))
    providers = packages_distributions()
    for module, path in modules().items():
        needs_peft = module.startswith("lola_flwr.model.own_tuners.")
        for name, at_once in imported(ast.parse(path.read_text(encoding="utf-8"))):
            if name == "peft" and needs_peft:
                continue
            if name in {"lola_flwr", *sys.stdlib_module_names, *TRACKERS}:
                continue
            found = {canonicalize_name(d) for d in providers.get(name, [name])}
            assert found & (always if at_once else anyhow), f"{module} imports {name}"


def test_names_of_clients_are_imported_when_asked_for():
    """Each from where type checkers see it; the linter compares these with __all__."""
    program = (
        "import sys, lola_flwr.clients as clients\n"
        "assert not {'torch', 'flwr'} & set(sys.modules)\n"
        "clients.node_profile\n"
        "assert not {'torch', 'flwr'} & set(sys.modules)\n"
        "for name in clients.__all__:\n"
        "    assert getattr(clients, name).__name__ == name\n"
        "assert not hasattr(clients, 'no_such_name')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_types_of_every_app_are_checked():
    """Under the names that they are imported by."""
    apps = {path.parent for path in (ROOT / "simulations").rglob("pyproject.toml")}
    bases = PYPROJECT["tool"]["mypy"]["mypy_path"].split(":")
    assert {ROOT / base for base in bases} == apps


def test_what_pages_and_docstrings_refer_to_exists():
    """Modules and names after ``lola_flwr.``, and paths of modules."""
    folders = ("lola_flwr", "simulations", "docs", "clients", "strategies")
    files = [ROOT / "README.md", *(p for f in folders for p in (ROOT / f).rglob("*"))]
    for path in files:
        if path.suffix not in {".py", ".md", ".toml", ".sh", ".ipynb", ".service"}:
            continue
        text = path.read_text(encoding="utf-8")
        for name in re.findall(r"lola_flwr(?:\.\w+)+", text):
            module = name
            while module not in modules():
                module = module.rpartition(".")[0]
            attribute = name.removeprefix(module).strip(".").partition(".")[0]
            found = importlib.import_module(module)
            assert not attribute or hasattr(found, attribute), f"{path}: {name}"
        for name in re.findall(r"`((?:lola_flwr|clients|strategies)/\S+?)`", text):
            assert list(ROOT.glob(name)), f"{path}: {name}"


def write_quotes():
    """Put the contracts into the page."""
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    write_quotes()
