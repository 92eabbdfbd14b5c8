"""Rows of a figure, as CSV and as markdown."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

Row = Mapping[str, str | int | float]


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write rows that all have the keys of the first, in its order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def markdown_table(rows: Sequence[Row]) -> str:
    """Return rows as a markdown table; numbers are aligned to the right."""
    columns = list(rows[0])
    rules = [":--" if isinstance(value, str) else "--:" for value in rows[0].values()]
    body = [[str(row[column]) for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [columns, rules, *body])


def numbers(rows: Sequence[Row], key: str) -> list[float]:
    """Return one column as floats."""
    return [float(row[key]) for row in rows]
