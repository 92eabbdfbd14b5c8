"""``lola-flwr report``: one HTML file about one run or several."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from lola_flwr.cli.paths import LOCAL_PATH
from lola_flwr.errors import UserError

_RUNS = Path("runs")


def report(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            click_type=LOCAL_PATH,
            help="Directories of runs [default: the latest under runs/].",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            click_type=LOCAL_PATH,
            help="File to write [default: report.html in the first run].",
        ),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="Compare by what it cost to get there, as 'accuracy>=0.83'; may be "
            "given several times [default: the runs' own, or what all came to]."
        ),
    ] = None,
    open_: Annotated[
        bool, typer.Option("--open", help="Show it in the browser.")
    ] = False,
) -> None:
    """Write the report of a run, or of several side by side, as one HTML file.

    Example: `lola-flwr report --open`

    Another: `lola-flwr report runs/exact runs/crunch --target 'accuracy>=0.8'`
    """
    from lola_flwr.report import Report, Run
    from lola_flwr.run.target import Target

    directories = runs or [latest_run(_RUNS)]
    found = [Run.read(directory) for directory in directories]
    first = directories[0] if directories[0].is_dir() else directories[0].parent
    targets = [Target.parse(text) for text in target or ()]
    path = Report(found, targets=targets).save(out or first / "report.html")
    print(f"report: {path}")
    if open_ and not webbrowser.open(path.resolve().as_uri()):
        raise UserError(f"No browser could be started; open {path.resolve()} in one.")


def latest_run(directory: Path) -> Path:
    """Return the run in a directory whose rounds were written last.

    Raises
    ------
    UserError
        There is none.
    """
    logs = directory.glob("*/rounds.jsonl")
    latest = max(logs, key=lambda log: log.stat().st_mtime, default=None)
    if latest is None:
        raise UserError(
            f"There is no run in {directory}/; give a run's directory, or make one: "
            "`lola-flwr simulate simulations/glue --devices 6`."
        )
    return latest.parent
