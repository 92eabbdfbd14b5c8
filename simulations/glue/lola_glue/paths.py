"""Where devices keep what they need from one message to the next."""

from __future__ import annotations

import os
from pathlib import Path

from lola_flwr.clients.store import device_directory


def devices_directory(run_id: int) -> Path:
    """Return the directory of what this host's devices keep during a run."""
    root = Path(os.environ.get("FLWR_HOME", "~/.flwr")).expanduser()
    directory: Path = device_directory(root / "lola-flwr" / "devices", run_id)
    return directory
