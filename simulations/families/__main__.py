"""Try every class: ``python -m simulations.families --out runs/families``.

Classes that the directory has results of are not tried again: a sweep that was stopped
goes on, and several, as of some tasks each, add up to one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import transformers

from lola_flwr.machine.files import local_path, replacing
from simulations.families.classes import model_classes
from simulations.families.processes import try_all
from simulations.families.table import page, summary
from simulations.families.trial import Trial


def main(arguments: Sequence[str] | None = None) -> int:
    """Try the classes; return 1 if the library is wrong about one."""
    parser = _parser()
    options = parser.parse_args(arguments)
    every = model_classes()
    asked = [
        kind
        for kind in every
        if (not options.only or any(word in kind.name for word in options.only))
        and (not options.tasks or kind.task in options.tasks)
    ]
    path = options.out / "families.jsonl"
    trials = _read(path)
    if options.again:
        kept = trials.keys() - {kind.name for kind in asked}
        trials = {name: trial for name, trial in trials.items() if name in kept}
    left = [kind for kind in asked if kind.name not in trials]
    lacking = {kind.name for kind in every} - trials.keys()
    lacking -= {kind.name for kind in left}
    if options.page and lacking:
        parser.error(
            f"--page lists all {len(every)} classes, of which {len(lacking)} are "
            f"neither asked for nor in {path} ({min(lacking)}, ...); leave out --only "
            "and --tasks to try them, too."
        )
    print(f"{len(left)} to try, {len(asked) - len(left)} in {path} already", flush=True)
    with replacing(path) as unfinished:
        unfinished.write_text("".join(map(_line, trials.values())), encoding="utf-8")
    with path.open("a", encoding="utf-8") as file:
        for trial in try_all(left, seconds=options.seconds):
            trials[trial.name] = trial
            file.write(_line(trial))
            file.flush()
            said = f": {trial.reason}" if trial.reason else ""
            print(f"{trial.outcome:9} {trial.task}, {trial.name}{said}", flush=True)
    found = [trials[kind.name] for kind in asked]
    print(summary(found))
    if options.page:
        everything = [trials[kind.name] for kind in every]
        options.page.write_text(page(everything), encoding="utf-8")
    return int(any(trial.outcome == "wrong" for trial in found))


def _read(path: Path) -> dict[str, Trial]:
    """Read what an earlier run with the same transformers has found, by class."""
    if not path.exists():
        return {}
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {
        line["name"]: Trial(**{k: v for k, v in line.items() if k != "transformers"})
        for line in lines
        if line["transformers"] == transformers.__version__
    }


def _line(trial: Trial) -> str:
    line = {"transformers": transformers.__version__, **asdict(trial)}
    return json.dumps(line) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m simulations.families", description=__doc__
    )
    add = parser.add_argument
    add(
        "--out", type=local_path, default=Path("runs/families"), help="where results go"
    )
    add("--only", nargs="+", help="classes whose names have one of these words in them")
    add("--tasks", nargs="+", help="classes of these tasks")
    add("--again", action="store_true", help="try, too, what --out has results of")
    add("--seconds", type=float, default=120, help="that a class may take")
    add(
        "--page",
        type=local_path,
        help="write the tables of all classes as a page of the documentation",
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
