"""The file that a run's records are kept in, one a line."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from itertools import accumulate
from pathlib import Path
from typing import IO, Any, TypeVar, overload

from pydantic_core import from_json

from lola_flwr.errors import UserError
from lola_flwr.machine.files import writing
from lola_flwr.run.records import BlockRecord, Record, RoundRecord, StepRecord

_Known = TypeVar("_Known", BlockRecord, RoundRecord, StepRecord)
_NAMES = {
    record: frozenset(f.name for f in fields(record))
    for record in (BlockRecord, RoundRecord, StepRecord)
}


def read_rounds(path: Path) -> list[Record]:
    """Read the records of a file that a `RoundLog` wrote, or is still writing.

    Raises
    ------
    UserError
        The file cannot be read, or a line of it is no record.
    """
    return list(LoggedRounds(path))


class LoggedRounds(Sequence[Record]):
    """The records of a file, each read when it is asked for: as few are in memory.

    Parameters
    ----------
    path
        File that a `RoundLog` wrote, or is still writing: what is added later is not
        seen.

    Raises
    ------
    UserError
        The file cannot be read, or (when it is asked for) a line of it is no record.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with _reading(path), path.open("rb") as file:
            # A line without an end is still being written.
            ends = accumulate(len(line) for line in file if line.endswith(b"\n"))
            self._starts = [0, *ends]

    def __len__(self) -> int:
        """Return how many rounds there are."""
        return len(self._starts) - 1

    @overload
    def __getitem__(self, place: int) -> Record: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[Record]: ...

    def __getitem__(self, place: int | slice) -> Record | Sequence[Record]:
        """Read one record, or several."""
        if isinstance(place, slice):
            return [self[n] for n in range(*place.indices(len(self)))]
        n = range(len(self))[place]
        with _reading(self._path), self._path.open("rb") as file:
            file.seek(self._starts[n])
            return self._record(file, n)

    def __iter__(self) -> Iterator[Record]:
        """Read them one after the other."""
        with _reading(self._path), self._path.open("rb") as file:
            for n in range(len(self)):
                yield self._record(file, n)

    def _record(self, file: IO[bytes], n: int) -> Record:
        line = file.read(self._starts[n + 1] - self._starts[n])
        return _read_record(line, f"{self._path}, line {n + 1}")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None


def require_training(records: Sequence[Record]) -> None:
    """Refuse to call a run complete in which no device has ever trained anything.

    Raises
    ------
    UserError
        There is no round, or none in which an update was accepted.
    """
    if any(map(_has_trained, records)):
        return
    why = "there was no round"
    if records:
        last = records[-1]
        said = last.skipped
        if isinstance(last, RoundRecord) and last.blocks:
            said = f"{last.blocks[0].device}: {last.blocks[0].status}"
        why = f"round {last.server_round}: {said}"
    raise UserError(
        f"Nothing was trained, no update of any device could be used ({why}); the "
        "warnings above say more."
    )


def _has_trained(record: Record) -> bool:
    if isinstance(record, RoundRecord):
        return any(block.status == "accepted" for block in record.blocks)
    return record.skipped is None


def _read_record(line: bytes, where: str) -> Record:
    try:
        values = from_json(line)
        blocks = tuple(_known(BlockRecord, block) for block in values.pop("blocks", ()))
        values["bound_s"] = _or_nan(values.get("bound_s"))
        for name in ("metrics", "start_metrics"):
            metrics = values.get(name, {})
            values[name] = {metric: _or_nan(value) for metric, value in metrics.items()}
        if values.get("exchanges"):
            return _known(StepRecord, values)
        return _known(RoundRecord, {**values, "blocks": blocks})
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{where} is no record of a round: {error}.") from None


def _known(record: type[_Known], values: Mapping[str, Any]) -> _Known:
    """Make a record of those values that it has fields for."""
    names = _NAMES[record]
    if values.keys() <= names:
        return record(**values)
    return record(**{name: v for name, v in values.items() if name in names})


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


class RoundLog:
    """Appends records to a JSON-lines file.

    Parameters
    ----------
    path
        The file; its directory is made.
    num_bytes
        To go on with a run: the file's length after its last complete round. What is
        beyond, of a round that was cut off, is dropped. (Default: start a file.)

    Raises
    ------
    UserError
        There is such a file already, nothing is overwritten; the one to go on with is
        shorter; or it cannot be written.
    """

    def __init__(self, path: Path, num_bytes: int | None = None) -> None:
        self.path = path
        if num_bytes and not (path.is_file() and path.stat().st_size >= num_bytes):
            raise UserError(
                f"{path} lacks rounds that the checkpoint beside it counts; put it "
                "back, or give this run another output directory."
            )
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("a").close()
            if num_bytes is None and path.stat().st_size:
                raise UserError(
                    f"{path} holds the rounds of an earlier run; give this run another "
                    "output directory, or move that file away."
                )
            os.truncate(path, num_bytes or 0)

    def append(self, record: Record) -> int:
        """Write one record, down to the disk; return the file's length.

        Raises
        ------
        UserError
            The file cannot be written.
        """
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(record.to_json() + "\n")
            file.flush()
            os.fsync(file.fileno())
            return file.tell()
