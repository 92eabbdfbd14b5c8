"""Run the sweep: ``python -m simulations.adapters --out runs/adapters``."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import transformers

from lola_flwr.machine.files import local_path
from simulations.adapters.cases import FAMILIES, Case, cases, tunings
from simulations.adapters.check import Outcome, try_case
from simulations.adapters.table import document

Outcomes = dict[Case, Outcome]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sweep; return 1 if a case is wrong."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    # peft warns of much that is meant here.
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    outcomes: Outcomes = {}
    for family in options.families:
        print(f"{family} ...", file=sys.stderr, flush=True)
        outcomes |= sweep(family, options.tunings)
    text = document(outcomes)
    print(text)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "adapters.md").write_text(text + "\n", encoding="utf-8")
    return any(outcome.verdict == "wrong" for outcome in outcomes.values())


def sweep(family: str, chosen: Sequence[str]) -> Outcomes:
    """Try tuners on one family, and read what they save back in another process."""
    # FRoD draws progress bars.
    quiet = contextlib.redirect_stderr(io.StringIO())
    with quiet, tempfile.TemporaryDirectory() as directory:
        outcomes = {}
        for tuning in chosen:
            for case in cases(tuning, family):
                place = Path(directory, case.name)
                place.mkdir()
                outcomes[case] = try_case(case, place)
        faults = _read_back(Path(directory))
    return {case: _judged(case, one, faults) for case, one in outcomes.items()}


def _read_back(directory: Path) -> dict[str, str]:
    program = [sys.executable, "-m", "simulations.adapters.read_back", str(directory)]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line[:1] == "{"]
    return {line["name"]: line["fault"] for line in lines}


def _judged(case: Case, outcome: Outcome, faults: Mapping[str, str]) -> Outcome:
    """Add what reading back has found."""
    if outcome.verdict != "right":
        return outcome
    fault = faults.get(case.name, "not read back")
    return replace(outcome, verdict="wrong", line=fault) if fault else outcome


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m simulations.adapters")
    parser.add_argument("--out", type=local_path, help="directory for the table")
    parser.add_argument(
        "--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), metavar="F"
    )
    parser.add_argument(
        "--tunings", nargs="+", choices=tunings(), default=tunings(), metavar="T"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
