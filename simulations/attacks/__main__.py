"""Run the attacks: ``python -m simulations.attacks --out runs/attacks``."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from lola_flwr.errors import UserError
from lola_flwr.machine.files import local_path
from simulations.attacks.attack import HONEST, Attack
from simulations.attacks.data import DATA_ATTACKS
from simulations.attacks.federation import Scenario, run
from simulations.attacks.gradients import GRADIENT_ATTACKS
from simulations.attacks.lies import LIES
from simulations.attacks.table import attack_rows
from simulations.figures.tables import Row, markdown_table, write_csv

NONE = Attack(name=HONEST)
ATTACKS = {a.name: a for a in (NONE, *GRADIENT_ATTACKS, *DATA_ATTACKS, *LIES)}
_SPLITS = {"iid": None, "dirichlet": 0.3}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the attacks; return the exit status."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    # That a head has new weights is no news here.
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        rows = [*outcomes(options)]
    except UserError as error:
        print(f"error: {error}")
        return 1
    write_csv(options.out / "attacks.csv", rows)
    print(markdown_table(attack_rows(rows)))
    return 0


def outcomes(options: argparse.Namespace) -> Iterator[Row]:
    """Give one row a run; those that were finished before are read."""
    names = options.attacks or [*ATTACKS]
    if unknown := [name for name in names if name not in ATTACKS]:
        known = ", ".join(ATTACKS)
        raise UserError(f"Unknown attack {unknown[0]!r}; choose from: {known}.")
    file: Path = options.out / "runs.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    known_outcomes = _finished(file)
    for seed in range(options.seeds):
        for split in options.splits:
            for codec in options.codecs:
                for name in names:
                    for share in (0.0,) if name == HONEST else options.shares:
                        scenario = Scenario(
                            share=share,
                            alpha=_SPLITS[split],
                            codec=codec,
                            seed=seed,
                            rounds=options.rounds,
                            own_examples=options.own_examples,
                        )
                        key = json.dumps([name, asdict(scenario)])
                        if key not in known_outcomes:
                            outcome = asdict(run(scenario, ATTACKS[name]))
                            known_outcomes[key] = outcome
                            with file.open("a", encoding="utf-8") as lines:
                                lines.write(json.dumps([key, outcome]) + "\n")
                        yield {
                            "attack": name,
                            "share": share,
                            "split": split,
                            "codec": codec,
                            "seed": seed,
                            **known_outcomes[key],
                        }


def _finished(file: Path) -> dict[str, Row]:
    """Return the outcomes of the runs that were finished before."""
    if not file.exists():
        return {}
    lines = file.read_text(encoding="utf-8").splitlines()
    return dict(json.loads(line) for line in lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m simulations.attacks")
    parser.add_argument("--out", type=local_path, default=Path("runs/attacks"))
    parser.add_argument("--attacks", nargs="+", help="some of them, by name")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.1, 0.2, 0.3])
    parser.add_argument("--splits", nargs="+", choices=_SPLITS, default=[*_SPLITS])
    parser.add_argument("--codecs", nargs="+", default=["fp32"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--own-examples", type=int, default=Scenario.own_examples)
    parser.add_argument("--rounds", type=int, default=Scenario.rounds)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
