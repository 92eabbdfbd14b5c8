"""A run while it goes on: progress, the last round's devices, the metric so far."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lola_flwr.cli.console import bars, table
from lola_flwr.errors import UserError
from lola_flwr.run.records import Record, RoundRecord
from lola_flwr.run.round_log import read_rounds

_MAX_DEVICES = 16
_SPARKS = "▁▂▃▄▅▆▇█"


class RunView:
    """Shows a run from the file of rounds that it writes.

    Parameters
    ----------
    path
        The file; it need not be there yet.
    num_rounds
        Rounds of the whole run; None if that is not known.
    """

    def __init__(self, path: Path, num_rounds: int | None) -> None:
        self._path = path
        self._num_rounds = num_rounds
        self._start = time.monotonic()
        self._size = -1
        self._rounds: list[Record] = []

    def __rich__(self) -> RenderableType:
        """Return what there is to see now."""
        self._follow()
        passed_s = time.monotonic() - self._start
        if not self._rounds:
            return Text(f"waiting for the first round ... {passed_s:.0f} s", "dim")
        last = self._rounds[-1]
        parts = [_progress(last, self._num_rounds, passed_s), _metrics(self._rounds)]
        if isinstance(last, RoundRecord) and last.blocks:
            parts.append(_devices(last))
        return Group(*parts)

    def _follow(self) -> None:
        try:
            size = self._path.stat().st_size
            if size != self._size:
                self._rounds = read_rounds(self._path)
                self._size = size
        except (OSError, UserError):
            # Not there yet. What is wrong with it, the report will say.
            return


def _progress(last: Record, total: int | None, passed_s: float) -> Table:
    line = Table.grid(padding=(0, 2))
    known = "" if total is None else f" of {total}"
    line.add_row(
        Text(f"round {last.server_round}{known}", "bold"),
        ProgressBar(total=total, completed=last.server_round, width=30),
        f"{passed_s:.0f} s here",
        f"{last.wireless_s:.1f} s of wireless time",
    )
    return line


def _metrics(rounds: Sequence[Record]) -> Table:
    line = Table.grid(padding=(0, 2))
    last = rounds[-1]
    words = [
        f"latency {last.observed_s:.3f} s"
        if last.skipped is None
        else f"skipped: {last.skipped}"
    ]
    losses = [r.train_loss for r in rounds if r.train_loss is not None]
    if losses:
        words.append(f"train loss {losses[-1]:.4f} {_spark(losses)}")
    evaluated = [r.metrics for r in rounds if r.metrics]
    for name in evaluated[-1] if evaluated else ():
        if name != "loss":
            values = [metrics[name] for metrics in evaluated if name in metrics]
            words.append(f"{name} {values[-1]:.4f} {_spark(values)}")
    refused = sum(
        sum(record.refused.values())
        for record in rounds
        if isinstance(record, RoundRecord)
    )
    if refused:
        words.append(f"{refused} updates refused")
    line.add_row(*map(Text, words))
    return line


def _devices(last: RoundRecord) -> Table:
    rows = table("", "device", "block", "share", "compute", "upload")
    rows.add_column("▒ compute  █ upload", justify="left")
    for block in last.blocks[:_MAX_DEVICES]:
        accepted = block.status == "accepted"
        rows.add_row(
            Text(block.device, "" if accepted else "red"),
            str(block.block_index),
            f"{block.share:.1%}",
            f"{block.compute_s:.2f} s",
            f"{block.upload_s:.2f} s",
            bars(block.compute_s, block.upload_s, last.round_s)
            if accepted
            else Text(block.status, "red"),
        )
    if len(last.blocks) > _MAX_DEVICES:
        rows.add_row(f"and {len(last.blocks) - _MAX_DEVICES} more")
    return rows


def _spark(values: Sequence[float], width: int = 16) -> str:
    shown = values[-width:]
    low, high = min(shown), max(shown)
    scale = (len(_SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_SPARKS[round((value - low) * scale)] for value in shown)
