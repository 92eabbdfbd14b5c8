"""What is installed of all that the package and its extras require."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

_IMPORT_S = 120.0
# Says what it imports, so that a crash shows where it was.
_IMPORT = """
import importlib, sys, warnings
warnings.simplefilter("ignore")
lacking = sys.argv[1].split()
for name in sys.argv[2:]:
    print("importing", name, flush=True)
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] not in lacking:
            raise
"""


@dataclass(frozen=True)
class Versions:
    """The versions of some requirements.

    Parameters
    ----------
    tested
        Those in the range that the package was tested with, as ``"rich 14.1"``.
    not_tested
        Those outside, with the range.
    missing
        What is not installed.
    """

    tested: tuple[str, ...]
    not_tested: tuple[str, ...]
    missing: tuple[str, ...]

    def __str__(self) -> str:
        """Say all of it on a line."""
        parts = {
            "missing": self.missing,
            "not tested": self.not_tested,
            "tested": self.tested,
        }
        return "; ".join(f"{k}: {', '.join(v)}" for k, v in parts.items() if v)


def versions_of(wanted: Iterable[Requirement]) -> Versions:
    """Look up what versions there are of some requirements."""
    tested, other, missing = [], [], []
    for requirement in {r.name: r for r in wanted}.values():
        name = requirement.name
        try:
            found = version(name)
        except PackageNotFoundError:
            missing.append(name)
            continue
        if requirement.specifier.contains(found, prereleases=True):
            tested.append(f"{name} {found}")
        else:
            other.append(f"{name} {found} ({requirement.specifier})")
    return Versions(tuple(tested), tuple(other), tuple(missing))


def modules_of(wanted: Iterable[Requirement]) -> list[str]:
    """Return the modules that can be imported of some requirements."""
    names = {canonicalize_name(requirement.name) for requirement in wanted}
    return sorted(
        module
        for module, distributions in packages_distributions().items()
        if module.isidentifier()
        and not module.startswith("_")
        and names & {canonicalize_name(name) for name in distributions}
    )


def own_modules(package: str = "lola_flwr") -> list[str]:
    """Return all modules of the package, without importing any."""
    (place,) = find_spec(package).submodule_search_locations  # type: ignore[union-attr,misc]
    found = []
    for directory, inner, files in os.walk(place, followlinks=True):
        if "__init__.py" not in files:
            # Kits beside the modules: no packages.
            inner.clear()
            continue
        room = Path(directory).relative_to(place).parts
        found += [
            ".".join((package, *room, *({path.stem} - {"__init__"})))
            for path in map(Path, files)
            if path.suffix == ".py"
        ]
    return sorted(found)


def why_not_imported(modules: Sequence[str], lacking: Iterable[str] = ()) -> str | None:
    """Import modules in a process of its own; return what went wrong, if anything.

    Parameters
    ----------
    modules
        Names of the modules.
    lacking
        Distributions that are not installed, and that modules may need nevertheless.
    """
    names = " ".join(name.replace("-", "_") for name in lacking)
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _IMPORT, names, *modules],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_IMPORT_S,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return f"{', '.join(modules)}: not imported within {_IMPORT_S:g} s"
    if done.returncode == 0:
        return None
    begun = re.findall(r"^importing (\S+)$", done.stdout, re.MULTILINE)
    return f"{begun[-1] if begun else 'Python'}: {_how_it_ended(done)}"


def _how_it_ended(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        return f"Python crashed, {signal.Signals(-done.returncode).name}"
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return said[-1] if said else f"Python ended with code {done.returncode}"
