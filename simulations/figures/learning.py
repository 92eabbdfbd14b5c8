"""Learning curves against wireless time, from runs of the GLUE app.

Each run is a real Flower simulation. Its configuration is written beside its round log,
and a finished run of the same configuration is not repeated, so that an interrupted
series goes on where it was.
"""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lola_flwr.run.target import Target
from lola_flwr.simulation import FinishedRun, run_app
from lola_flwr.simulation.flower_app import check_config, check_start, read_app
from lola_flwr.simulation.process import own_processes

APP = Path(__file__).parents[1] / "glue"
EMBEDDED_TASK = "acceptability"
METHODS: Mapping[str, Mapping[str, Any]] = {
    "exact": {"allocator": "exact"},
    "crunch": {"allocator": "crunch"},
    "random": {"allocator": "random"},
    "fedavg-full+shares": {"method": "fedavg-full", "allocator": "exact"},
}
ROTATION_EPS = 0.2
# The same split and fleet without and with rotation: a device's data are one-sided.
ROTATIONS: Mapping[str, Mapping[str, Any]] = {
    name: {
        "partitioning": "dirichlet",
        "dirichlet-alpha": 0.3,
        "rotation-eps": eps,
    }
    for name, eps in (("exact", 0.0), ("rotation", ROTATION_EPS))
}

Record = Mapping[str, Any]


class RunFailed(RuntimeError):
    """A run did not complete; the message is the app's own."""


@dataclass(frozen=True)
class LearningSetting:
    """What all runs of a series have in common.

    Parameters
    ----------
    glue
        Directory with GLUE data; None for the task that is embedded in the app.
    seeds
        Repetitions; a seed decides fleet, channel, split and batches.
    rounds, eval_every
        Rounds of a run, and after how many of them the model is evaluated.
    num_devices
        Devices of the fleet.
    model
        Model of the run configuration.
    """

    glue: Path | None = None
    seeds: int = 3
    rounds: int = 30
    eval_every: int = 3
    num_devices: int = 6
    model: str = "minilm-l6"

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks to learn."""
        return (EMBEDDED_TASK,) if self.glue is None else ("sst-2", "cola")

    def overrides(self, task: str, seed: int) -> dict[str, Any]:
        """Return the run configuration of one task and seed, methods apart."""
        return {
            "task": task,
            "data-dir": "" if self.glue is None else str(self.glue.absolute()),
            "model": self.model,
            "num-devices": self.num_devices,
            "rounds": self.rounds,
            "eval-every": self.eval_every,
            "seed": seed,
            # All methods see the same samples, and send them alike.
            "batch-size": 32,
            "codec": "fp32",
        }


@dataclass(frozen=True)
class LearningRun:
    """A finished run.

    Parameters
    ----------
    task, method, seed
        What was run.
    config
        Its whole run configuration.
    records
        Its round log.
    """

    task: str
    method: str
    seed: int
    config: Mapping[str, Any]
    records: Sequence[Record]

    @property
    def metric(self) -> str:
        """Name of the task's primary metric: the app logs it before all others."""
        evaluated = next(r for r in self.records if r["metrics"])
        return next(str(name) for name in evaluated["metrics"] if name != "loss")


def run_all(
    setting: LearningSetting,
    methods: Mapping[str, Mapping[str, Any]],
    directory: Path,
    *,
    tasks: Sequence[str] | None = None,
    launch: Callable[..., FinishedRun] = run_app,
    report: Callable[[str], object] = print,
) -> list[LearningRun]:
    """Run every task, seed and method, or take over what was run before.

    Parameters
    ----------
    setting
        What the runs have in common.
    methods
        Overrides of the run configuration, by method.
    directory
        Where the runs' files go.
    tasks
        Tasks to learn (default: those of the setting).
    launch
        Starts a run, as `simulations.run.run_app` does.
    report
        Called with one line for each run.

    Returns
    -------
    The runs, by task, then seed, then method.

    Raises
    ------
    RunFailed
        A run did not complete.
    """
    runs = []
    for task in setting.tasks if tasks is None else tasks:
        for seed in range(setting.seeds):
            for method, overrides in methods.items():
                overrides = {**setting.overrides(task, seed), **overrides}
                config, records = finished_run(
                    directory / f"{task}-{method}-seed{seed}",
                    overrides,
                    home=directory / "flwr-home",
                    launch=launch,
                    report=report,
                )
                runs.append(LearningRun(task, method, seed, config, records))
    return runs


def run_in_processes(
    app: Path, *, num_devices: int, run_config: Sequence[str], home: Path
) -> FinishedRun:
    """Run an app as `run_app` does, but in this process and others beside it.

    Neither Ray nor a SuperLink is started; the records are the same.
    """
    found = read_app(app)
    config = {**found.config, **tomllib.loads("\n".join(run_config))}
    check_config(found, config)
    check_model = check_start(found, config, num_devices)
    with own_processes(found, num_devices=num_devices, config=config, home=home) as run:
        check_model()
        return run(None)


def finished_run(
    directory: Path,
    overrides: Mapping[str, Any],
    *,
    home: Path,
    launch: Callable[..., FinishedRun] = run_app,
    report: Callable[[str], object] = print,
) -> tuple[Mapping[str, Any], Sequence[Record]]:
    """Return a run's configuration and round log; run it where there is none.

    Parameters
    ----------
    directory
        The run's directory: config.json and rounds.jsonl. A run of this configuration
        that was stopped goes on there from its last checkpoint.
    overrides
        What differs from the app's own configuration; names num-devices.
    home
        FLWR_HOME of a new run.
    launch, report
        As in `run_all`.

    Raises
    ------
    RunFailed
        The run did not complete.
    """
    config = {**app_config(), **overrides}
    records = reusable_records(directory, config)
    if records is not None:
        report(f"{directory.name}: finished before")
        return config, records
    if not _is_of(directory, config):
        # What an earlier configuration left must not be taken for this one's.
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        text = json.dumps(config, indent=1)
        _config_file(directory).write_text(text, encoding="utf-8")
    run_config = {**overrides, "output-dir": str(directory.absolute())}
    finished = launch(
        APP,
        num_devices=int(overrides["num-devices"]),
        # JSON's strings, numbers and booleans are TOML's.
        run_config=[f"{key}={json.dumps(value)}" for key, value in run_config.items()],
        home=home,
    )
    records = reusable_records(directory, config)
    if not finished.completed or records is None:
        reason = finished.error or f"the run is {finished.status}"
        raise RunFailed(f"{directory.name}: {reason}")
    # There is nothing left to resume, and many runs' checkpoints fill a disk.
    shutil.rmtree(directory / "checkpoints", ignore_errors=True)
    report(f"{directory.name}: {finished.final}")
    return config, records


def app_config() -> dict[str, Any]:
    """Return the app's own configuration: a change of a default is a change, too."""
    with (APP / "pyproject.toml").open("rb") as file:
        config: dict[str, Any] = tomllib.load(file)["tool"]["flwr"]["app"]["config"]
    return config


def reusable_records(
    directory: Path, config: Mapping[str, Any]
) -> Sequence[Record] | None:
    """Return the round log of a complete run of this configuration, if there is one.

    It is complete after all rounds, or the one in which the target was reached.
    """
    if not _is_of(directory, config):
        return None
    try:
        lines = (directory / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
        records: list[Record] = [json.loads(line) for line in lines]
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    numbers = [record["server_round"] for record in records]
    if not records or numbers != list(range(1, len(records) + 1)):
        return None
    target = str(config["target"])
    is_there = bool(target) and Target.parse(target).holds(records[-1]["metrics"])
    return records if is_there or len(records) == int(config["rounds"]) else None


def _is_of(directory: Path, config: Mapping[str, Any]) -> bool:
    """Tell whether a run's directory is that of a configuration.

    A key that the app did not have then had the default that it came with.
    """
    try:
        known = json.loads(_config_file(directory).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return bool({**app_config(), **known} == dict(config))


def _config_file(directory: Path) -> Path:
    return directory / "config.json"
