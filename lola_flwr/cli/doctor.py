"""``lola-flwr doctor``: what works here, and what to do about what does not."""

from __future__ import annotations

import textwrap
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from lola_flwr.cli.console import console, print_json
from lola_flwr.errors import UserError

if TYPE_CHECKING:
    from lola_flwr.cli.diagnosis import Finding

_INDENT = 19
_MARKS = {"ok": ("✓", "green"), "note": ("•", "yellow"), "problem": ("✗", "bold red")}


def doctor(
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="Start and import nothing; look at versions only."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check this machine: versions, imports, SuperLink, Ray, GPU, hub, tc.

    Whatever is missing or broken comes with a command that mends it.

    The exit code is 0 unless something that simulation needs is broken.

    Example: `lola-flwr doctor`
    """
    from lola_flwr.cli.diagnosis import diagnose

    findings = []
    out = console()
    for finding in diagnose(start=not quick):
        findings.append(finding)
        if not as_json:
            out.print(_shown(finding, out.width), soft_wrap=True)
    if as_json:
        print_json([asdict(finding) for finding in findings])
    broken = [f.subject for f in findings if f.status == "problem"]
    if broken:
        raise UserError(f"These need attention: {', '.join(broken)}.")


def _shown(finding: Finding, width: int) -> Text:
    mark, style = _MARKS[finding.status]
    # The advice is a command, often: it stays on its line.
    said = textwrap.wrap(
        finding.says, width - _INDENT, break_long_words=False, break_on_hyphens=False
    )
    line = Text.assemble(
        (f"{mark} ", style),
        (f"{finding.subject:<{_INDENT - 2}}", "bold"),
        f"\n{'':{_INDENT}}".join(said),
    )
    if finding.advice:
        line.append(f"\n{'':{_INDENT}}→ {finding.advice}", style)
    return line
