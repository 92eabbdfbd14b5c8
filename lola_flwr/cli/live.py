"""A run while it goes on: progress, forecast, the last round's devices, metrics."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
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
    clock
        Tells the seconds that have passed.
    """

    def __init__(
        self,
        path: Path,
        num_rounds: int | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = path
        self._num_rounds = num_rounds
        self._clock = clock
        self._start = clock()
        self._size = -1
        self._rounds: list[Record] = []
        # Rounds that had ended, and when that was seen: at first and at last.
        self._first_seen: tuple[int, float] | None = None
        self._last_seen = (0, self._start)
        # Rounds of a run that goes on have their times elsewhere.
        self._follow()
        self._first_seen = None

    def __rich__(self) -> RenderableType:
        """Return what there is to see now."""
        self._follow()
        passed_s = self._clock() - self._start
        if not self._rounds:
            return Text(f"waiting for the first round ... {passed_s:.0f} s", "dim")
        last = self._rounds[-1]
        parts: list[RenderableType] = [
            _bar(last.server_round, self._num_rounds),
            self._times(last, passed_s),
            _metrics(self._rounds),
        ]
        if isinstance(last, RoundRecord) and last.blocks:
            parts.append(_devices(last))
        return Group(*parts)

    def _follow(self) -> None:
        try:
            size = self._path.stat().st_size
            if size == self._size:
                return
            self._rounds = read_rounds(self._path)
            self._size = size
        except (OSError, UserError):
            # Not there yet. What is wrong with it, the report will say.
            return
        if self._rounds:
            self._last_seen = (self._rounds[-1].server_round, self._clock())
            self._first_seen = self._first_seen or self._last_seen

    def _times(self, last: Record, passed_s: float) -> Text:
        words = [f"{duration(passed_s)} here", f"{last.wireless_s:.1f} s wireless time"]
        left_s = None
        if self._num_rounds is not None and self._first_seen is not None:
            left_s = seconds_left(self._first_seen, self._last_seen, self._num_rounds)
        if left_s is not None:
            left_s = max(0.0, left_s - (self._clock() - self._last_seen[1]))
            at = datetime.now() + timedelta(seconds=left_s)
            words.insert(1, f"about {duration(left_s)} left, until {at:%H:%M}")
        return Text("   ".join(words))


def seconds_left(
    first: tuple[int, float], last: tuple[int, float], num_rounds: int
) -> float | None:
    """Forecast how long a run goes on after its last round, at its pace so far.

    What comes before the first round, as loading the model, is no part of the pace.

    Parameters
    ----------
    first, last
        Rounds that had ended, and when that was.
    num_rounds
        Rounds of the whole run.

    Returns
    -------
    Seconds; None before there is a pace, and where no round is left.
    """
    if not first[0] < last[0] < num_rounds:
        return None
    return (num_rounds - last[0]) * (last[1] - first[1]) / (last[0] - first[0])


def duration(seconds: float) -> str:
    """Write a duration no more precisely than it matters: ``42 s``, ``3 h 5 min``."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return (
        f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
    )


def _bar(done: int, total: int | None) -> Table:
    line = Table.grid(padding=(0, 2))
    known = "" if total is None else f" of {total}"
    line.add_row(
        Text(f"round {done}{known}", "bold"),
        ProgressBar(total=total, completed=done, width=30),
    )
    return line


def _metrics(rounds: Sequence[Record]) -> Text:
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
    # One text, which goes on in the next line where the terminal is narrow.
    return Text("   ".join(words))


def _devices(last: RoundRecord) -> Table:
    rows = table("", "device", "block", "share", "compute", "upload")
    rows.add_column("▒ compute  █ upload", justify="left")
    for block in last.blocks[:_MAX_DEVICES]:
        accepted = block.status == "accepted"
        rows.add_row(
            Text(block.device, "" if accepted else "red"),
            block.numbers,
            f"{block.share:.1%}",
            f"{block.compute_s:.2f} s",
            f"{block.upload_s:.2f} s",
            bars(block.compute_s, block.upload_s, last.round_s, turn_s=block.turn_s)
            if accepted
            else Text(block.status, "red"),
        )
    if len(last.blocks) > _MAX_DEVICES:
        rows.add_row(f"and {len(last.blocks) - _MAX_DEVICES} more")
    return rows


def _spark(values: Sequence[float], width: int = 16) -> str:
    shown = [value for value in values[-width:] if math.isfinite(value)]
    if not shown:
        return ""
    low, high = min(shown), max(shown)
    scale = (len(_SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_SPARKS[round((value - low) * scale)] for value in shown)
