"""What the tree holds, for tests that must not miss what is new."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lola_flwr"


@cache
def package_files() -> dict[str, Path]:
    """Return the package's files by their path in it, links to directories followed."""
    return {
        (Path(directory) / name).relative_to(ROOT).as_posix(): Path(directory) / name
        for directory, _, names in os.walk(PACKAGE, followlinks=True)
        for name in names
        if "__pycache__" not in directory
    }


@cache
def modules() -> dict[str, Path]:
    """Return the package's modules by the name that they are imported by."""
    found = {}
    for name, path in package_files().items():
        if path.suffix == ".py":
            dotted = name.removesuffix(".py").replace("/", ".")
            found[dotted.removesuffix(".__init__")] = path
    return dict(sorted(found.items()))
