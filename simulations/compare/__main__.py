"""Run the comparison: ``python -m simulations.compare --out runs/compare``."""

from __future__ import annotations

import argparse
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from lola_flwr.errors import UserError
from lola_flwr.machine.files import local_path
from lola_flwr.run.target import Target
from simulations.compare.methods import Method, Point, RunSettings
from simulations.compare.report import comparison_figure, comparison_rows
from simulations.compare.runs import run_method
from simulations.compare.tasks import Task, image_task, text_task
from simulations.figures.pages import SCREEN
from simulations.figures.tables import Row, markdown_table, write_csv

METHODS = Path(__file__).with_name("comparison.toml")
TEXTURES = "textures"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison; return the exit status."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        compare(options)
    except UserError as error:
        print(f"error: {error}")
        return 1
    return 0


def compare(options: argparse.Namespace) -> None:
    """Run every method on every task for every seed; write table and figure."""
    methods = read_methods(options.config)
    unknown = [name for name in options.methods or () if name not in methods]
    if unknown:
        raise UserError(
            f"Unknown method {unknown[0]!r}; {options.config} has {', '.join(methods)}."
        )
    target = Target.parse(options.target) if options.target else None
    if options.until_target and target is None:
        raise UserError("--until-target needs --target, as 'accuracy>=0.8'.")
    settings = RunSettings(
        rounds=options.rounds,
        eval_every=options.eval_every,
        num_devices=options.devices,
        batch_size=options.batch_size,
        decay=options.decay,
        until=options.target if options.until_target else "",
    )
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    curves: list[Row] = []
    for task_name in options.tasks:
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            for name in options.methods or methods:
                config = {
                    "task": task_name,
                    "glue": str(options.glue),
                    "model": options.model,
                    "held_out": options.held_out,
                    "lr": options.lr,
                    "train_examples": options.train_examples,
                    "method": name,
                    **asdict(methods[name]),
                    **asdict(replace(settings, seed=seed)),
                }
                file = out / f"{task_name}-{name}-seed{seed}.json"
                points = finished_points(file, config)
                if points is None:
                    task = load_task_named(task_name, options, seed)
                    points = _run(
                        task, methods[name], replace(settings, seed=seed), name
                    )
                    content = {"config": config, "points": points}
                    file.write_text(json.dumps(content, indent=1), encoding="utf-8")
                about = {"task": task_name, "method": name, "seed": seed}
                curves += [
                    # Points of an earlier version do not tell it.
                    {**about, "joules": "", **point}
                    for point in points
                ]
    write_csv(out / "curves.csv", curves)
    if target is not None:
        target.require_in({str(point["metric"]): 0.0 for point in curves})
    rows = comparison_rows(curves, target)
    write_csv(out / "comparison.csv", rows)
    SCREEN.save(lambda _: comparison_figure(curves), out / "comparison")
    print(markdown_table(rows))


def read_methods(path: Path) -> dict[str, Method]:
    """Read the methods to compare.

    Raises
    ------
    UserError
        The file is none, or names a field that methods do not have.
    """
    try:
        with path.open("rb") as file:
            content = tomllib.load(file)["methods"]
        return {name: Method(**fields) for name, fields in content.items()}
    except (OSError, tomllib.TOMLDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None


def finished_points(file: Path, config: Mapping[str, object]) -> list[Row] | None:
    """Return the points of a run of this configuration that was finished before."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    known: list[Row] = content["points"]
    # Through JSON both ways: it has no tuples.
    return known if content["config"] == json.loads(json.dumps(config)) else None


def load_task_named(name: str, options: argparse.Namespace, seed: int) -> Task:
    """Load a task anew: with the values to start from."""
    rate = {} if options.lr is None else {"lr": options.lr}
    if name == TEXTURES:
        return image_task(num_devices=options.devices, seed=seed, **rate)
    return text_task(
        name,
        data_dir=None if name == "acceptability" else options.glue,
        num_devices=options.devices,
        seed=seed,
        model_name=options.model,
        train_examples=options.train_examples or None,
        held_out=options.held_out or None,
        **rate,
    )


def _run(task: Task, method: Method, settings: RunSettings, name: str) -> list[Row]:
    def show(point: Point) -> None:
        metrics = ", ".join(f"{k} {v:.4f}" for k, v in point.metrics.items())
        print(
            f"{task.name} {name} seed {settings.seed} round {point.server_round}: "
            f"{metrics}, {point.flops / 1e9:.1f} GFLOP, {point.wireless_s:.1f} s",
            flush=True,
        )

    return [_row(point) for point in run_method(task, method, settings, show)]


def _row(point: Point) -> Row:
    metric = next(name for name in point.metrics if name != "loss")
    return {
        "server_round": point.server_round,
        "metric": metric,
        "value": point.metrics[metric],
        "loss": point.metrics["loss"],
        "wireless_s": point.wireless_s,
        "flops": point.flops,
        "payload_bytes": point.payload_bytes,
        "memory_bytes": point.memory_bytes,
        "joules": "" if point.joules is None else point.joules,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m simulations.compare", description=__doc__
    )
    add = parser.add_argument
    add("--out", type=local_path, default=Path("runs/compare"), help="where results go")
    add("--config", type=local_path, default=METHODS, help="the methods, as TOML")
    add("--methods", nargs="+", help="some of them (default: all)")
    add("--tasks", nargs="+", default=["acceptability", TEXTURES], help="what to learn")
    add("--glue", type=local_path, help="directory with GLUE's TSV files")
    add("--model", default="minilm-l6", help="model of the text tasks")
    add("--seeds", type=int, default=1, help="how many seeds")
    add("--first-seed", type=int, default=0, help="the first of them")
    add("--rounds", type=int, default=30)
    add("--eval-every", type=int, default=5)
    add("--devices", type=int, default=6)
    add("--batch-size", type=int, default=32, help="examples of a device's mini-batch")
    add("--lr", type=float, help="learning rate (default: the task's own)")
    add("--decay", action="store_true", help="let the learning rate fall to zero")
    add("--train-examples", type=int, default=0, help="of a text task; 0: all")
    add("--held-out", type=int, default=0, help="examples to judge by; 0: all")
    add("--target", help="what rows say the cost of, as 'accuracy>=0.8'")
    add("--until-target", action="store_true", help="which then ends a run")
    add("--threads", type=int, default=1, help="threads of PyTorch")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
