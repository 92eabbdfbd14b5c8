"""``lola-flwr doctor``: what works here, and what to do about what does not."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.text import Text

from lola_flwr.cli.console import console, print_json
from lola_flwr.errors import UserError

_MARKS = {"ok": ("✓", "green"), "note": ("•", "yellow"), "problem": ("✗", "bold red")}


def doctor(
    quick: Annotated[
        bool, typer.Option("--quick", help="Start nothing; look at versions only.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check this machine: versions, SuperLink, Ray, GPU, hub, tc.

    The exit code is 0 unless something that simulation needs is broken.

    Example: `lola-flwr doctor`
    """
    from lola_flwr.cli.diagnosis import diagnose

    findings = []
    out = console()
    for finding in diagnose(start=not quick):
        findings.append(finding)
        if as_json:
            continue
        mark, style = _MARKS[finding.status]
        line = Text.assemble(
            (f"{mark} ", style), (f"{finding.subject:<17}", "bold"), finding.says
        )
        if finding.advice:
            line.append(f"\n{'':19}→ {finding.advice}", style)
        out.print(line)
    if as_json:
        print_json([asdict(finding) for finding in findings])
    broken = [f.subject for f in findings if f.status == "problem"]
    if broken:
        raise UserError(f"These need attention: {', '.join(broken)}.")
