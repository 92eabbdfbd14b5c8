"""What the site has beside the pages: a page a room of the code, style and script."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

HERE = Path(__file__).parent
PACKAGE = HERE.parents[1] / "lola_flwr"
ASSETS = (HERE / "site.css", *HERE.glob("vendor/*"))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the code, which mkdocstrings fills, and the assets."""
    for path in ASSETS:
        source = str(path)
        files.append(File.generated(config, f"assets/{path.name}", abs_src_path=source))
    rooms = [path.parent for path in PACKAGE.glob("*/__init__.py")]
    flat = [path for path in PACKAGE.glob("*.py") if path.stem != "__init__"]
    for name in (path.stem for path in (*rooms, *flat)):
        content = f"# {name}\n\n::: lola_flwr.{name}\n"
        files.append(File.generated(config, f"reference/{name}.md", content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Name what lies outside the documentation, to which the site can have no link."""
    docs = Path(config.docs_dir).resolve()
    here = docs / Path(page.file.src_uri).parent

    def named(match: re.Match[str]) -> str:
        target = (here / match[2]).resolve()
        if target.is_relative_to(docs) or not target.is_relative_to(docs.parent):
            return match[0]
        return f"{match[1]} (`{target.relative_to(docs.parent)}`)"

    return re.sub(r"\[([^]]*)\]\((\.\./[^)#]*)\)", named, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Mark the words of code in tables, which are not to be broken at their hyphens."""

    def words(code: re.Match[str]) -> str:
        return re.sub(r"\S+", r"<span>\g<0></span>", code[0])

    def cells(table: re.Match[str]) -> str:
        return re.sub(r"(?<=<code>)[^<]+(?=</code>)", words, table[0])

    return re.sub(r"<table>.*?</table>", cells, html, flags=re.DOTALL)
