"""How figures are laid out: for a screen, or for a column of a paper."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_PAPER_WIDTH_IN = 3.5
# Of a column's panels, and of each line of the legend below them.
_PAPER_PANEL_IN = 2.2
_PAPER_LINE_IN = 0.15
_FORMATS = ("png", "pdf", "svg")
_SCREEN_TEXT = {
    "figure.titlesize": 11.0,
    "axes.titlesize": 10.0,
    "legend.fontsize": 9.0,
    "figure.dpi": 100.0,
}
_PAPER_TEXT = {
    "font.size": 8.0,
    "axes.titlesize": 8.0,
    "axes.labelsize": 8.0,
    "xtick.labelsize": 7.0,
    "ytick.labelsize": 7.0,
    "legend.fontsize": 7.0,
    # Outlines that journals take: Type 3 fonts are refused by many.
    "pdf.fonttype": 42,
    "axes.linewidth": 0.6,
    "hatch.linewidth": 0.5,
}


@dataclass(frozen=True)
class Page:
    """Where figures go.

    Parameters
    ----------
    is_paper
        Whether it is a column of a paper: 3.5 in wide, panels one below the other, no
        title inside, and linear axes over the region of interest.
    format
        Format of the files: the ending of their names.
    """

    is_paper: bool = False
    format: str = "png"

    def panels(
        self, count: int, size_in: tuple[float, float]
    ) -> tuple[Figure, list[Axes]]:
        """Return a figure and its panels.

        Parameters
        ----------
        count
            How many panels.
        size_in
            Width and height on a screen, where panels are side by side.
        """
        if self.is_paper:
            size_in = _PAPER_WIDTH_IN, _PAPER_PANEL_IN * count
        figure = Figure(figsize=size_in, layout="constrained")
        grid = (count, 1) if self.is_paper else (1, count)
        return figure, [*figure.subplots(*grid, squeeze=False).flat]

    def legend(self, figure: Figure, axes: Axes, *, columns: int) -> None:
        """Put the legend of some axes below all panels.

        Parameters
        ----------
        figure, axes
            The figure, and the axes with what it names.
        columns
            Its columns on a screen.
        """
        handles, labels = axes.get_legend_handles_labels()
        if self.is_paper:
            height_in = figure.get_figheight() + _PAPER_LINE_IN * (len(labels) + 1)
            figure.set_figheight(height_in)
        figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=1 if self.is_paper else columns,
            handlelength=3.5,
        )

    def scaled(self, points: float) -> float:
        """Return the size of a marker or a line, given that on a screen."""
        return 0.55 * points if self.is_paper else points

    def save(self, draw: Callable[[Page], Figure], path: Path, title: str = "") -> None:
        """Write a figure, and its title: on top, or for a paper beside it as text.

        Parameters
        ----------
        draw
            Draws the figure for a page.
        path
            The file, without its ending.
        title
            What the figure shows, and whose choice it is; "" for none.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        # Ticks are made when a figure is written, too.
        with rc_context(self._text):
            figure = draw(self)
            if title and self.is_paper:
                path.with_suffix(".txt").write_text(f"{title}\n", encoding="utf-8")
            elif title:
                figure.suptitle(title)
            figure.savefig(path.with_suffix(f".{self.format}"), dpi=130)

    @property
    def _text(self) -> Any:
        return _PAPER_TEXT if self.is_paper else _SCREEN_TEXT


SCREEN = Page()


def add_page_options(parser: argparse.ArgumentParser) -> None:
    """Let a command line say how figures are laid out."""
    parser.add_argument(
        "--format", choices=_FORMATS, default="png", help="format of the figures"
    )
    parser.add_argument(
        "--style",
        choices=("screen", "paper"),
        default="screen",
        help="paper: 3.5 in wide, no title inside (it is beside the figure, as text), "
        "linear axes over the region of interest",
    )


def page_of(arguments: argparse.Namespace) -> Page:
    """Return the page that a command line asks for."""
    return Page(is_paper=arguments.style == "paper", format=arguments.format)
