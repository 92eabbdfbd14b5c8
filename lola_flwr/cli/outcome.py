"""How a simulated run ended, and where everything is that it left."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lola_flwr.cli.console import print_json
from lola_flwr.errors import UserError

if TYPE_CHECKING:
    from lola_flwr.simulation import FinishedRun

# A directory that transformers or peft can load has one of these.
_OF_A_MODEL = ("config.json", "adapter_config.json")


def report_end(finished: FinishedRun, directory: Path | None, *, as_json: bool) -> None:
    """Write the run's report, and say how the run ended and where its files are.

    Parameters
    ----------
    finished
        How the run ended.
    directory
        Where its files are; None if the app does not say.
    as_json
        Whether that is said as JSON.

    Raises
    ------
    UserError
        The run has failed.
    """
    report = _write_report(directory)
    error = None
    if not finished.completed:
        error = finished.error or f"the run is {finished.status}"
    if as_json:
        print_outcome(
            finished.status,
            error=error,
            final=finished.final,
            directory=directory,
            report=report,
        )
    if error is not None:
        raise UserError(error)
    if as_json:
        return
    if directory is not None:
        print(f"files: {directory}")
        if (rounds := _rounds(directory)) is not None:
            print(f"rounds: {rounds}")
        for model in _models(directory):
            print(f"model: {model}")
    if report is not None:
        print(f"report: {report}")
    print(finished.final or "completed")


def print_outcome(
    status: str,
    *,
    error: str | None,
    final: str | None = None,
    directory: Path | None = None,
    report: Path | None = None,
) -> None:
    """Print how a run ended as JSON."""
    rounds = None if directory is None else _rounds(directory)
    print_json(
        {
            "status": status,
            "final": final,
            "error": error,
            "directory": None if directory is None else str(directory),
            "rounds": None if rounds is None else str(rounds),
            "models": [] if directory is None else [*map(str, _models(directory))],
            "report": None if report is None else str(report),
        }
    )


def _rounds(directory: Path) -> Path | None:
    """Return the file of rounds, if the app has written any."""
    rounds = directory / "rounds.jsonl"
    # A run that fails in its first round leaves an empty file.
    return rounds if rounds.is_file() and rounds.stat().st_size else None


def _models(directory: Path) -> list[Path]:
    """Return the directories of saved models, whatever the app calls them."""
    files = (path for name in _OF_A_MODEL for path in directory.glob(f"*/{name}"))
    return sorted({path.parent for path in files})


def _write_report(directory: Path | None) -> Path | None:
    """Write the run's report, if the app has written rounds.

    Where that fails there is a warning: how the run itself ended matters more.
    """
    if directory is None or _rounds(directory) is None:
        return None
    from lola_flwr.report import Report, Run

    try:
        return Report([Run.read(directory)]).save(directory / "report.html")
    except Exception as error:
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        print(f"warning: no report: {kind}{error}", file=sys.stderr)
        return None
