"""Gather the evidence: ``python -m simulations.evidence --glue path/to/glue``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lola_flwr.errors import UserError
from lola_flwr.machine.files import local_path
from simulations.evidence.claims import (
    BASELINE,
    OURS,
    Claim,
    end_rows,
    end_table,
    read_claims,
    verdict_rows,
)
from simulations.figures.learning import (
    LearningRun,
    RunFailed,
    finished_run,
    run_in_processes,
)
from simulations.figures.outcomes import curve_rows
from simulations.figures.pages import Page, add_page_options, page_of
from simulations.figures.plots import learning_figure
from simulations.figures.tables import Row, markdown_table, write_csv

CLAIMS = Path(__file__).with_name("evidence.toml")
_TABLES = "evidence.md"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was not run yet, and judge it; return the exit status."""
    options = _parser().parse_args(arguments)
    try:
        gather(options, page_of(options))
    except (UserError, RunFailed) as error:
        print(f"error: {error}")
        return 1
    return 0


def gather(options: argparse.Namespace, page: Page) -> None:
    """Run both methods on every task for every seed; write tables and curves."""
    methods, claims = read_claims(options.claims)
    unknown = [task for task in options.tasks or () if task not in claims]
    if unknown:
        raise UserError(
            f"No claim about {unknown[0]!r}; {options.claims} has {', '.join(claims)}."
        )
    if options.seeds < 1:
        raise UserError(f"--seeds={options.seeds}: give at least 1.")
    if options.tasks:
        claims = {task: claims[task] for task in options.tasks}
    runs: list[LearningRun] = []
    # Seed by seed, so that what there is when it is stopped compares all tasks.
    for seed in range(options.seeds):
        for task, claim in claims.items():
            runs += pair_of_runs(task, claim, methods, seed, options)
        write_results(claims, runs, options.out, page)
    print((options.out / _TABLES).read_text(encoding="utf-8"))


def pair_of_runs(
    task: str,
    claim: Claim,
    methods: Mapping[str, Mapping[str, Any]],
    seed: int,
    options: argparse.Namespace,
) -> list[LearningRun]:
    """Run both methods on a task, or take over what was run before."""
    runs = []
    for method, of_method in methods.items():
        overrides = {
            "task": task,
            "data-dir": "" if options.glue is None else str(options.glue.absolute()),
            "num-devices": options.devices,
            "seed": seed,
            **claim.config,
            **of_method,
            **claim.methods.get(method, {}),
        }
        config, records = finished_run(
            options.out / "runs" / f"{task}-{method}-seed{seed}",
            overrides,
            home=options.out / "flwr-home",
            launch=run_in_processes,
            report=partial(print, flush=True),
        )
        runs.append(LearningRun(task, method, seed, config, records))
    return runs


def write_results(
    claims: Mapping[str, Claim], runs: Sequence[LearningRun], out: Path, page: Page
) -> None:
    """Write curves, ends and verdicts as CSV, tables and a figure."""
    curves = curve_rows(runs)
    write_csv(out / "curves.csv", curves)
    tables = []
    verdicts: list[Row] = []
    for task, claim in claims.items():
        ends = end_rows([run for run in runs if run.task == task])
        write_csv(out / f"ends-{task}.csv", ends)
        tables += end_table(ends)
        verdicts += verdict_rows(task, claim, ends)
    write_csv(out / "verdicts.csv", verdicts)
    text = f"{markdown_table(tables)}\n\n{markdown_table(verdicts)}\n"
    (out / _TABLES).write_text(text, encoding="utf-8")
    page.save(
        lambda page: learning_figure(curves, (OURS, BASELINE), page),
        out / "evidence",
        "LoLa-DEFT beside FedAvg of the whole model; mean and range of the seeds",
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m simulations.evidence", description=__doc__
    )
    add = parser.add_argument
    add("--out", type=local_path, default=Path("runs/evidence"), help="for the results")
    add("--glue", type=local_path, help="directory with GLUE's TSV files")
    add("--claims", type=local_path, default=CLAIMS, help="claims and recipes, as TOML")
    add("--tasks", nargs="+", help="some of the tasks (default: all)")
    add("--seeds", type=int, default=3, help="runs of each, seeds 0, 1, ...")
    add("--devices", type=int, default=6)
    add_page_options(parser)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
