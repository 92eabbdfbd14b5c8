"""The projects here beside what becomes of them by their ``migration.diff``."""

from __future__ import annotations

import os
import re
import shutil
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path

from lola_flwr.simulation import run_app

HERE = Path(__file__).parent
# What a real project would have installed or downloaded, and what measures.
BESIDE = ("generated.py", "measured.py")


@dataclass(frozen=True)
class Project:
    """A project of the bench.

    Parameters
    ----------
    name
        Its directory, and its package.
    num_blocks
        Blocks of its model.
    metric
        What is compared: ``"accuracy"``, or ``"loss"`` where there is none.
    overrides
        Of its run configuration.
    """

    name: str
    num_blocks: int
    metric: str = "accuracy"
    overrides: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return " ".join([self.name, *(o.split("=")[1] for o in self.overrides)])

    @property
    def diff(self) -> str:
        return (HERE / self.name / "migration.diff").read_text()

    @property
    def node_counts(self) -> tuple[int, ...]:
        """Flower's default, as many as blocks, and three times as many."""
        return tuple(sorted({2, max(2, self.num_blocks), max(2, 3 * self.num_blocks)}))


PROJECTS = (
    Project("quickstart", 4),
    Project("quickstart_numpy", 4),
    Project("tabular", 2),
    Project("autoencoder", 3, "loss"),
    Project("sentiment", 4),
    Project("own_strategy", 4),
    Project("lora", 4, "loss"),
    Project("lora", 4, "loss", ('base="bfloat16"',)),
    Project("lora", 4, "loss", ('base="4bit"',)),
    Project("lora_numpy", 4, "loss"),
    Project("vit", 4),
    Project("wide_resnet", 3),
    Project("probing", 1),
)


def changed_lines(diff: str) -> int:
    """Count the lines that a diff changes; one in place of another is one."""
    changed = 0
    for run in re.findall(r"(?:^[-+](?!--|\+\+).*\n)+", diff, re.MULTILINE):
        marks = [line[0] for line in run.splitlines()]
        changed += max(marks.count("-"), marks.count("+"))
    return changed


def copied(project: Project, directory: Path) -> Path:
    """Copy a project as it is, with what the bench puts beside it."""
    app = directory / project.name
    shutil.copytree(
        HERE / project.name, app, ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in BESIDE:
        shutil.copy(HERE / name, app)
    pyproject = app / "pyproject.toml"
    text = pyproject.read_text()
    of_project = f'serverapp = "{project.name}.server_app:app"'
    assert of_project in text
    text = text.replace(of_project, 'serverapp = "measured:app"')
    pyproject.write_text(f'{text}project = "{project.name}"\nseeds = 1\n')
    return app


def migrated(project: Project, directory: Path, diff: str | None = None) -> Path:
    """Copy a project, and change it as its diff says, by nothing else."""
    app = copied(project, directory)
    for path, hunks in re.findall(
        r"^\+\+\+ b/(\S+)\n((?:^[-+ @].*\n?)+?)(?=^--- |\Z)",
        project.diff if diff is None else diff,
        re.MULTILINE,
    ):
        text = (app / path).read_text()
        for hunk in re.split(r"^@@ .*\n", hunks, flags=re.MULTILINE)[1:]:
            lines = [(line[:1], line[1:]) for line in hunk.splitlines(keepends=True)]
            old = "".join(line for mark, line in lines if mark != "+")
            new = "".join(line for mark, line in lines if mark != "-")
            assert text.count(old) == 1, f"{path}: {text.count(old)} times:\n{old}"
            text = text.replace(old, new)
        (app / path).write_text(text)
    return app


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Parameters
    ----------
    curves
        The metric before the first round and after each, of each seed.
    down_bytes, up_bytes
        Bytes of the arrays in training messages, mean of the seeds.
    """

    curves: tuple[tuple[float, ...], ...]
    down_bytes: float
    up_bytes: float

    @property
    def final(self) -> float:
        """The metric at the end, mean of the seeds."""
        return sum(curve[-1] for curve in self.curves) / len(self.curves)


def keeps_up(fedavg: float, lola: float, metric: str) -> bool:
    """Whether a metric is within 2 points of FedAvg's, or a loss within 5 %."""
    return lola >= fedavg - 0.02 if metric == "accuracy" else lola <= 1.05 * fedavg


def reached_after(outcome: Outcome, target: float, metric: str) -> int | None:
    """Return after how many rounds the seeds' mean reached a metric; None: never."""
    for server_round, values in enumerate(zip(*outcome.curves, strict=True)):
        mean = sum(values) / len(values)
        if server_round and (
            mean >= target if metric == "accuracy" else mean <= target
        ):
            return server_round
    return None


def run(
    app: Path,
    project: Project,
    nodes: int,
    *,
    home: Path,
    seeds: int = 1,
    overrides: tuple[str, ...] = (),
) -> Outcome:
    """Run a copy under Flower's simulation engine."""
    # Projects save models where they are.
    with chdir(home):
        finished = run_app(
            app,
            num_devices=nodes,
            run_config=(f"seeds={seeds}", *project.overrides, *overrides),
            home=home,
            # One process that imports PyTorch is enough.
            cpus_per_client=os.cpu_count() or 1,
        )
    assert finished.completed, finished.output[-5000:]
    parts = re.split(
        r"^seed \d+: (\d+) bytes down, (\d+) bytes up$",
        finished.output,
        flags=re.MULTILINE,
    )
    outputs, down, up = parts[0::3][:seeds], parts[1::3], parts[2::3]
    assert len(down) == seeds, finished.output[-5000:]
    return Outcome(
        curves=tuple(
            _numbers(rf"^round \d+:.* {project.metric} ([\d.]+)", output)
            for output in outputs
        ),
        down_bytes=sum(map(int, down)) / seeds,
        up_bytes=sum(map(int, up)) / seeds,
    )


def _numbers(pattern: str, output: str) -> tuple[float, ...]:
    return tuple(map(float, re.findall(pattern, output, re.MULTILINE)))
