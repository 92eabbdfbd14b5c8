"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path


def expanded(text: str) -> str:
    """Return a path, or whatever else may stand in its place, with ``~`` written out.

    Shells write it out themselves only where it starts a word: ``model=~/my-model`` and
    what stands in a file arrive as they are.
    """
    return os.path.expanduser(text)


def local_path(text: str | Path) -> Path:
    """Return a path on this host, ``~`` written out."""
    return Path(expanded(str(text)))
