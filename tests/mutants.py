"""Change the core a little, in thousands of ways, and see whether its tests notice.

``python -m tests.mutants`` has mutmut make the mutants of the modules that
pyproject.toml names, and run each module's own tests against them. It prints the
mutants that live, and fails if one of them is not among the accepted ones
(``accepted_mutants.toml``, which says why each is harmless), or if an accepted one
lives no longer. ``python -m tests.mutants MODULE...`` does so for some modules only;
``--again`` tries only those that lived, after tests were added.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence, Set
from pathlib import Path
from typing import NamedTuple

import tomli_w
from mutmut import __main__ as mutmut
from mutmut.configuration import config
from mutmut.mutation.data import SourceFileMutationData
from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.stats import status_by_exit_code
from mutmut.utils.file_utils import walk_mutatable_files

ACCEPTED = Path(__file__).with_name("accepted_mutants.toml")
LOG = Path("mutants", "run.log")
AGAIN = "--again"
# A mutant that does not come to an end is noticed, too.
NOTICED = ("killed", "timeout")


class Mutant(NamedTuple):
    """A change to one function; it keeps its name when lines move."""

    function: str
    was: str
    becomes: str

    def __str__(self) -> str:
        """Say it as an entry of ``accepted_mutants.toml``."""
        entry = {**self._asdict(), "becomes": [self.becomes], "why": ""}
        return tomli_w.dumps({"accepted": [entry]}, multiline_strings=True)


def dotted(module: Path) -> str:
    """Return the name that a module is imported by."""
    return ".".join(module.with_suffix("").parts)


def own_tests(module: Path) -> list[str]:
    """Return the tests of a module, in the room of its room's.

    They are of its name, or of as many of its words as any are: ``energy_search`` is
    tested by ``test_energy.py``, and what no name says by all tests of the room.
    """
    room = Path("tests", *module.parent.parts[1:])
    words = module.stem.split("_")
    for count in range(len(words), -1, -1):
        name = "_".join(["test", *words[:count]])
        if found := sorted(map(str, room.glob(f"{name}*.py"))):
            return found
    raise SystemExit(f"{module} has no tests of its own: {room}/test_{module.name}")


def verdicts(module: Path) -> dict[str, str]:
    """Return what became of each mutant of a module, by mutmut's name for it."""
    data = SourceFileMutationData(path=module)
    data.load()
    return {
        key: status_by_exit_code[code] for key, code in data.exit_code_by_key.items()
    }


def described(key: str, module: Path) -> Mutant:
    """Say what a mutant changes."""
    function = key.rpartition("__mutmut_")[0].replace("xǁ", "").replace("ǁ", ".")
    diff = get_diff_for_mutant(key, path=module).splitlines()[2:]
    was, becomes = (
        "\n".join(line[1:].strip() for line in diff if line[0] == sign) for sign in "-+"
    )
    return Mutant(function.replace(".x_", "."), was, becomes)


def try_module(module: Path, again: bool) -> None:
    """Try the mutants of one module."""
    config().pytest_add_cli_args_test_selection = own_tests(module)
    # Which test reaches what; otherwise that of the module before would be taken.
    Path("mutants", "mutmut-stats.json").unlink(missing_ok=True)
    names = [f"{dotted(module)}.x*"]
    if again:
        names = [key for key, s in verdicts(module).items() if s not in NOTICED]
    if names:
        mutmut._run(names, max_children=1)


def accepted_mutants() -> set[Mutant]:
    """Return the mutants that may live."""
    entries = tomllib.loads(ACCEPTED.read_text("utf-8"))["accepted"]
    return {
        Mutant(entry["function"], entry["was"].strip(), becomes.strip())
        for entry in entries
        for becomes in entry["becomes"]
        if entry["why"]
    }


def report(module: Path, accepted: Set[Mutant]) -> int:
    """Print what became of a module's mutants; return how many need a hand."""
    found = verdicts(module)
    living = {key: s for key, s in found.items() if s not in NOTICED}
    names = {key: described(key, module) for key in living}
    unexplained = {key: m for key, m in names.items() if m not in accepted}
    print(
        f"{module}: {len(found)} mutants, {len(found) - len(living)} noticed, "
        f"{len(living) - len(unexplained)} accepted, {len(unexplained)} unexplained"
    )
    for key, mutant in unexplained.items():
        print(f"\n# {living[key]}\n{mutant}")
    return len(unexplained) + report_gone(accepted - {*names.values()})


def report_gone(mutants: Set[Mutant]) -> int:
    """Print accepted mutants that live no longer; return how many there are."""
    for mutant in sorted(mutants):
        print(f"\n# lives no longer\n{mutant}")
    return len(mutants)


def try_apart(module: Path, again: bool) -> None:
    """Try a module in a process of its own: what its tests import stays in memory."""
    call = f"try_module(Path({str(module)!r}), again={again})"
    command = [sys.executable, "-c", f"from tests.mutants import *; {call}"]
    with LOG.open("a") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT)
    if done.returncode:
        raise SystemExit(f"mutmut failed on {module}; see the end of {LOG}.")


def main(arguments: Sequence[str]) -> int:
    """Try some modules, or all, one after the other; 1 if something needs a hand."""
    again = AGAIN in arguments
    chosen = [Path(name) for name in arguments if name != AGAIN]
    every = sorted(walk_mutatable_files())
    if unknown := {*chosen} - {*every}:
        raise SystemExit(f"{min(unknown)} is not in only_mutate of pyproject.toml.")
    if not again:
        shutil.rmtree("mutants", ignore_errors=True)
    LOG.parent.mkdir(exist_ok=True)
    LOG.unlink(missing_ok=True)
    sys.stdout.reconfigure(line_buffering=True)
    accepted, findings = accepted_mutants(), 0
    for module in chosen or every:
        try_apart(module, again)
        own = {m for m in accepted if m.function.startswith(f"{dotted(module)}.")}
        findings += report(module, own)
        accepted -= own
    if not chosen:
        findings += report_gone(accepted)
    return int(findings > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
