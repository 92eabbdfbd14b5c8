"""Checkpoints: a run's whole state in one file, written so that no crash can harm it.

A checkpoint is one safetensors file: arrays as tensors, everything else as JSON in its
header, and a checksum (XXH3) over both. It is written beside its place, flushed to the
disk and renamed into it, so that a name like ``round-000017.safetensors`` always stands
for a complete file; the checksum finds what a disk or an editor did to it later.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lola_flwr.errors import UserError, quoted
from lola_flwr.machine.files import replacing, writing

_PATTERN = "round-*.safetensors"
# By their names in a file's header; the first is written.
_CHECKSUMS: Mapping[str, Callable[[bytes], Any]] = {
    "xxh3": xxhash.xxh3_128,
    "sha256": hashlib.sha256,
}


class CheckpointDamaged(ValueError):
    """A file is no checkpoint, or is not as it was written."""


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The state of something at one moment.

    Parameters
    ----------
    arrays
        Arrays by name.
    values
        Everything else, as JSON knows it.
    """

    arrays: Mapping[str, npt.NDArray[Any]]
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run.

    Parameters
    ----------
    directory
        Where they are; made when the first is saved.
    keep
        How many of the latest to keep, at least 1.

    Raises
    ------
    UserError
        ``keep`` is less.
    """

    directory: Path
    keep: int = 3

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise UserError(f"keep={self.keep} checkpoints; keep at least 1.")

    def save(self, server_round: int, snapshot: Snapshot) -> Path:
        """Write the state after a round, and remove checkpoints beyond ``keep``.

        Raises
        ------
        UserError
            It cannot be written, as on a full disk; those before are as they were.
        """
        path = self.directory / f"round-{server_round:06d}.safetensors"
        with replacing(path) as unfinished:
            write(unfinished, snapshot)
            with unfinished.open("rb") as file:
                os.fsync(file.fileno())
        with writing(self.directory):
            # The rename itself is safe only when the directory is on the disk.
            _sync_directory(self.directory)
            for old in self._paths()[self.keep :]:
                old.unlink()
        return path

    def latest(self) -> tuple[Snapshot | None, list[str]]:
        """Read the latest checkpoint that is whole.

        Returns
        -------
        The snapshot, None if there is none; and one line for each later checkpoint
        that had to be passed over.
        """
        damaged: list[str] = []
        for path in self._paths():
            try:
                return read(path), damaged
            except CheckpointDamaged as error:
                damaged.append(f"{path.name}: {error}")
        return None, damaged

    def _paths(self) -> list[Path]:
        """Return the checkpoints' files, latest first."""
        return sorted(self.directory.glob(_PATTERN), reverse=True)


def read(path: Path) -> Snapshot:
    """Read one checkpoint.

    Raises
    ------
    CheckpointDamaged
        The file is truncated, changed, or something else altogether.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointDamaged(f"not readable ({quoted(error)})") from None
    text = metadata.get("state", "")
    # Earlier versions wrote the slower one.
    known = [name for name in _CHECKSUMS if name in metadata]
    if not known or metadata[known[0]] != _digest(known[0], arrays, text):
        raise CheckpointDamaged("its content does not match its checksum")
    return Snapshot(arrays, json.loads(text))


def write(path: Path, snapshot: Snapshot) -> None:
    """Write one file that `read` reads."""
    text = json.dumps(snapshot.values)
    arrays = {name: np.ascontiguousarray(a) for name, a in snapshot.arrays.items()}
    # ascontiguousarray makes scalars one-dimensional.
    arrays = {n: a.reshape(snapshot.arrays[n].shape) for n, a in arrays.items()}
    save_file(arrays, path, {"state": text, "xxh3": _digest("xxh3", arrays, text)})


def _digest(checksum: str, arrays: Mapping[str, npt.NDArray[Any]], text: str) -> str:
    """Return the checksum of names, types, shapes and values, and of the text."""
    digest = _CHECKSUMS[checksum](text.encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"\n{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return str(digest.hexdigest())


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
