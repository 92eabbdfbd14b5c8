"""Print what migrated projects come to: ``python -m tests.fedavg_apps [--only NAME]``.

Every project runs as it is and as its ``migration.diff`` makes it, under Flower's
simulation engine. Fails if a migrated project lags, or sends more than FedAvg.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from pathlib import Path

from tests.fedavg_apps.bench import (
    PROJECTS,
    Outcome,
    Project,
    changed_lines,
    copied,
    keeps_up,
    migrated,
    reached_after,
    run,
)
from tests.fedavg_apps.wireless import MODELS, planned_s

# A migrated project may take more rounds to FedAvg's metric, which are cheaper.
LONGER = 1.4
LARGEST_WIRELESS_RATIO = 0.5

# Under FedAvg and by blocks, by project and number of nodes.
Outcomes = dict[tuple[Project, int], tuple[Outcome, Outcome]]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fedavg_apps")
    parser.add_argument(
        "--only", action="append", metavar="PROJECT", help="projects (default: all)"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--nodes", type=int, help="nodes (default: three counts)")
    options = parser.parse_args()
    known = {project.name for project in PROJECTS}
    if unknown := {*(options.only or ())} - known:
        parser.error(f"--only {min(unknown)}: choose from {', '.join(sorted(known))}")
    chosen = [p for p in PROJECTS if not options.only or p.name in options.only]
    with tempfile.TemporaryDirectory() as directory:
        outcomes, good = table(chosen, options.seeds, options.nodes, Path(directory))
        good &= wireless(outcomes, options.seeds, Path(directory))
    return 0 if good else 1


def table(projects, seeds, nodes, directory: Path) -> tuple[Outcomes, bool]:
    """Run all, and print what they come to; return it, and whether all keep up."""
    print(
        "| project | changed lines | nodes | metric | FedAvg | LoLa-DEFT | down | up |"
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    good, outcomes = True, {}
    for number, project in enumerate(projects):
        lines = changed_lines(project.diff)
        for count in [nodes] if nodes else project.node_counts:
            fedavg, lola = both(project, count, seeds, directory / f"{number}-{count}")
            outcomes[project, count] = fedavg, lola
            down = lola.down_bytes / fedavg.down_bytes
            up = lola.up_bytes / fedavg.up_bytes
            is_good = (
                lines <= 5
                and down <= 1
                and up <= 1
                and keeps_up(fedavg.final, lola.final, project.metric)
            )
            good &= is_good
            print(
                f"| {project.title} | {lines} | {count} | {project.metric} | "
                f"{fedavg.final:.3f} | {lola.final:.3f}{'' if is_good else ' !'} | "
                f"{down:.2f} | {up:.2f} |",
                flush=True,
            )
    return outcomes, good


def both(
    project: Project, nodes: int, seeds: int, directory: Path
) -> tuple[Outcome, Outcome]:
    fedavg, lola = (
        run(
            make(project, directory / side),
            project,
            nodes,
            home=directory / side,
            seeds=seeds,
        )
        for side, make in (("fedavg", copied), ("lola", migrated))
    )
    return fedavg, lola


def wireless(outcomes: Outcomes, seeds: int, directory: Path) -> bool:
    """Print when the rounds reach FedAvg's final metric, at most nodes."""
    print("\n| project | nodes | FedAvg | rounds | LoLa-DEFT | rounds | ratio |")
    print("|---|---|---|---|---|---|---|", flush=True)
    good = True
    last = dict(outcomes.keys())
    for project, count in last.items():
        if project.name not in MODELS or project.overrides:
            continue
        fedavg, lola = outcomes[project, count]
        rounds = len(fedavg.curves[0]) - 1
        longer = math.ceil(LONGER * rounds)
        home = directory / f"wireless-{project.name}"
        app = copied(project, home / "fedavg")
        needed = reached_after(lola, fedavg.final, project.metric)
        if needed is None:
            # A run of more rounds is another one: rates may fall with the rounds.
            lola = run(
                migrated(project, home / "lola"),
                project,
                count,
                home=home,
                seeds=seeds,
                overrides=(f"num-server-rounds={longer}",),
            )
            needed = reached_after(lola, fedavg.final, project.metric)
        fedavg_s, lola_s = (
            planned_s(project, app, count, rounds=longer, by_blocks=by_blocks)
            for by_blocks in (False, True)
        )
        if needed is None:
            print(f"| {project.name} | {count} | never in {longer} rounds ! |")
            good = False
            continue
        ratio = lola_s[needed - 1] / fedavg_s[rounds - 1]
        is_good = ratio <= LARGEST_WIRELESS_RATIO
        good &= is_good
        print(
            f"| {project.name} | {count} | {fedavg_s[rounds - 1]:.2f} s | {rounds} | "
            f"{lola_s[needed - 1]:.2f} s | {needed} | "
            f"{ratio:.2f}{'' if is_good else ' !'} |",
            flush=True,
        )
    return good


if __name__ == "__main__":
    sys.exit(main())
