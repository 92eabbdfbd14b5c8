"""The reference: a page a room, found from the tree when the site is built."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PACKAGE = Path(__file__).parents[2] / "lola_flwr"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages, which mkdocstrings fills."""
    rooms = [path.parent for path in PACKAGE.glob("*/__init__.py")]
    flat = [path for path in PACKAGE.glob("*.py") if path.stem != "__init__"]
    for name in (path.stem for path in (*rooms, *flat)):
        content = f"# {name}\n\n::: lola_flwr.{name}\n"
        files.append(File.generated(config, f"reference/{name}.md", content=content))
    return files
