"""Run the attacks: ``python -m simulations.attacks --out runs/attacks``."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from lola_flwr.errors import UserError
from lola_flwr.machine.files import local_path
from simulations.attacks import federation, spread
from simulations.attacks.attack import BOTH, D2FT, HONEST, LOLA, Attack
from simulations.attacks.data import DATA_ATTACKS
from simulations.attacks.gradients import GRADIENT_ATTACKS
from simulations.attacks.lies import LIES
from simulations.attacks.parts import PART_ATTACKS
from simulations.attacks.scenario import MODELS, Outcome, Scenario, model_of
from simulations.attacks.table import attack_rows
from simulations.figures.tables import Row, markdown_table, write_csv

NONE = Attack(name=HONEST, methods=BOTH)
ATTACKS = {
    a.name: a for a in (NONE, *GRADIENT_ATTACKS, *DATA_ATTACKS, *LIES, *PART_ATTACKS)
}
_RUNS: dict[str, Callable[[Scenario, Attack], Outcome]] = {
    LOLA: federation.run,
    D2FT: spread.run,
}
# Why an attack may not exist under a method.
_UNKNOWN = {
    LOLA: "LoLa-DEFT, where no device sends hidden states",
    D2FT: "D2FT, where no device sends a block's gradient",
}
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
    attacks = attacks_of(options.method, options.attacks)
    file: Path = options.out / "runs.jsonl"
    scenarios = _scenarios(options)
    file.parent.mkdir(parents=True, exist_ok=True)
    known_outcomes = _finished(file)
    for split, scenario in scenarios:
        for attack in attacks:
            for share in (0.0,) if attack.name == HONEST else options.shares:
                this = replace(scenario, share=share)
                key = this.key(attack.name)
                if key not in known_outcomes:
                    outcome = asdict(_RUNS[this.method](this, attack))
                    known_outcomes[key] = outcome
                    with file.open("a", encoding="utf-8") as lines:
                        lines.write(json.dumps([key, outcome]) + "\n")
                yield {
                    "model": this.model,
                    "method": this.method,
                    "attack": attack.name,
                    "share": share,
                    "split": split,
                    "codec": this.codec,
                    "seed": this.seed,
                    **known_outcomes[key],
                }


def attacks_of(method: str, names: Sequence[str] | None = None) -> list[Attack]:
    """Return the attacks that there are under a method, or those of some names.

    Raises
    ------
    UserError
        There is no such attack, or not under this method.
    """
    known = [name for name, attack in ATTACKS.items() if method in attack.methods]
    for name in names or ():
        if name in known:
            continue
        what = f"Unknown attack {name!r}"
        if name in ATTACKS:
            what = f"Attack {name!r} does not exist under {_UNKNOWN[method]}"
        raise UserError(f"{what}; choose from: {', '.join(known)}.")
    return [ATTACKS[name] for name in names or known]


def _scenarios(options: argparse.Namespace) -> list[tuple[str, Scenario]]:
    """Return what is to be run, but for the share of hostile devices, with its split.

    Raises
    ------
    UserError
        Options that do not go together.
    """
    recipe = model_of(options.method, options.model).recipe
    own_examples = options.own_examples
    if options.method == D2FT:
        if own_examples:
            raise UserError(
                f"--own-examples {own_examples}: under D2FT the server compares "
                "devices' gradients with none; leave it out."
            )
        if coded := [codec for codec in options.codecs if codec != "fp32"]:
            raise UserError(
                f"--codecs {coded[0]}: under D2FT all travels as fp32; leave it out."
            )
        own_examples = 0
    return [
        (
            split,
            Scenario(
                alpha=_SPLITS[split],
                codec=codec,
                seed=seed,
                rounds=recipe.rounds if options.rounds is None else options.rounds,
                batch_size=recipe.batch_size,
                lr=recipe.lr,
                own_examples=(
                    Scenario.own_examples if own_examples is None else own_examples
                ),
                model=options.model,
                method=options.method,
            ),
        )
        for seed in range(options.seeds)
        for split in options.splits
        for codec in options.codecs
    ]


def _finished(file: Path) -> dict[str, Row]:
    """Return the outcomes of the runs that were finished before."""
    if not file.exists():
        return {}
    lines = file.read_text(encoding="utf-8").splitlines()
    return dict(json.loads(line) for line in lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m simulations.attacks")
    parser.add_argument("--out", type=local_path, default=Path("runs/attacks"))
    parser.add_argument("--method", choices=MODELS, default=Scenario.method)
    parser.add_argument(
        "--model",
        choices=dict.fromkeys(name for models in MODELS.values() for name in models),
        default=Scenario.model,
    )
    parser.add_argument("--attacks", nargs="+", help="some of them, by name")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.1, 0.2, 0.3])
    parser.add_argument("--splits", nargs="+", choices=_SPLITS, default=[*_SPLITS])
    parser.add_argument("--codecs", nargs="+", default=["fp32"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--own-examples", type=int, help="default: 64, or none under D2FT"
    )
    parser.add_argument("--rounds", type=int, help="default: those that suit the model")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
