"""What commands print with: rich on a terminal, plain text elsewhere."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

_BAR_WIDTH = 32
# A table that goes into a file or a pipe is not broken at 80 columns.
_PIPE_WIDTH = 160

# What Flower puts before what is no warning.
_INFO = re.compile(r"^INFO *: {0,6}")


def console() -> Console:
    """Return a console on today's standard output."""
    # What files and devices call themselves is text, never markup.
    width = None if sys.stdout.isatty() else _PIPE_WIDTH
    return Console(highlight=False, markup=False, width=width)


def table(title: str, *columns: str, left: int = 1) -> Table:
    """Return an empty table whose first columns are words, and the others numbers."""
    made = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for number, column in enumerate(columns):
        if number < left:
            made.add_column(column, no_wrap=True, overflow="ellipsis", max_width=24)
        else:
            made.add_column(column, justify="right", no_wrap=True)
    return made


def print_json(value: Any) -> None:
    """Print strict JSON, for programs to read."""
    print(json.dumps(value, indent=2, allow_nan=False))


def plain_line(line: str) -> str:
    """Return a line of Flower's log for a file or a pipe: no colors, no ``INFO``."""
    return _INFO.sub("", click.unstyle(line)).rstrip()


def bars(
    compute_s: float, upload_s: float, round_s: float, *, turn_s: float = 0.0
) -> Text:
    """Draw a device's round as two bars on the scale of the whole round.

    Between them it may wait for its turn.
    """
    compute, begun, total = (
        round(_BAR_WIDTH * seconds / round_s)
        for seconds in (
            compute_s,
            compute_s + turn_s,
            compute_s + turn_s + upload_s,
        )
    )
    waits = Text(" " * (begun - compute))
    return Text("▒" * compute, "yellow") + waits + Text("█" * (total - begun), "cyan")
