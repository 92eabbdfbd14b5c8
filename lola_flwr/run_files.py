"""Where a run's files go, and the file that describes it."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("lola-flwr", "flwr", "torch", "transformers", "numpy")


def run_directory(output_dir: str, run_id: int) -> Path:
    """Return where a run's files go.

    Parameters
    ----------
    output_dir
        What the run configuration says; "" for ``lola-flwr/<run id>`` under FLWR_HOME.
    run_id
        Flower's number of the run.
    """
    if output_dir:
        return Path(output_dir).expanduser().absolute()
    home = Path(os.environ.get("FLWR_HOME", "~/.flwr")).expanduser()
    return home / "lola-flwr" / str(run_id)


def describe_run(directory: Path, *, app: str, config: Mapping[str, Any]) -> None:
    """Write ``run.json``: what was run, how it was configured, and with what versions.

    Parameters
    ----------
    directory
        The run's directory; it is made.
    app
        Name of the app.
    config
        Its run configuration.
    """
    description = {
        "app": app,
        "config": dict(config),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in _PACKAGES},
        },
    }
    directory.mkdir(parents=True, exist_ok=True)
    # Whoever reads it while it is written sees the old file or the new one.
    part = directory / "run.json.part"
    part.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    part.replace(directory / "run.json")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
