"""Try every class: ``python -m simulations.families --out runs/families``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from lola_flwr.machine.files import local_path
from simulations.families.classes import model_classes
from simulations.families.processes import try_all
from simulations.families.table import page, summary


def main(arguments: Sequence[str] | None = None) -> int:
    """Try the classes; return 1 if the library is wrong about one."""
    options = _parser().parse_args(arguments)
    kinds = [
        kind
        for kind in model_classes()
        if (not options.only or any(word in kind.name for word in options.only))
        and (not options.tasks or kind.task in options.tasks)
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    trials = []
    with (options.out / "families.jsonl").open("w", encoding="utf-8") as file:
        for trial in try_all(kinds, seconds=options.seconds):
            trials.append(trial)
            file.write(json.dumps(asdict(trial)) + "\n")
            file.flush()
            said = f": {trial.reason}" if trial.reason else ""
            print(f"{trial.outcome:9} {trial.task}, {trial.name}{said}", flush=True)
    print(summary(trials))
    if options.page:
        options.page.write_text(page(trials), encoding="utf-8")
    return int(any(trial.outcome == "wrong" for trial in trials))


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
    add("--seconds", type=float, default=120, help="that a class may take")
    add(
        "--page",
        type=local_path,
        help="write the tables as a page of the documentation",
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
