"""What a device keeps on its disk from one message to the next.

A SuperNode starts a fresh process for every message, and any worker of a simulation may
serve any of its devices: what a device keeps is in files. (Flower's ``Context.state``
is pushed whole with every message, and meant for kilobytes; a block is megabytes.)
Files are safetensors, written under another name first, so that a crash leaves no half
of one.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from lola_flwr.arrays import Float32Array
from lola_flwr.machine.files import local_path, replacing, writing
from lola_flwr.wire.packing import moved_by
from lola_flwr.wire.versions import Manifest, digest

_DAY_S = 86_400
# What a piece was before, and what was evaluated: the server's own values.
_OTHERS = 2


class LostCopy(Exception):
    """A device does not hold what a message left out."""


def run_store(run_id: int, root: Path | None = None) -> Path:
    """Return a device's directory for one run, and remove those of earlier runs.

    What is in them has a use in their run only. Another run's directory counts as
    earlier if nothing was written to it for a day; a device whose directory was removed
    all the same is sent everything anew.

    Parameters
    ----------
    run_id
        The run, as ``Context.run_id`` tells it.
    root
        Directory of the device, or of all devices of a simulation (default:
        ``lola-flwr/devices`` under FLWR_HOME).
    """
    if root is None:
        home = local_path(os.environ.get("FLWR_HOME", "~/.flwr"))
        root = home / "lola-flwr" / "devices"
    directory = root / str(run_id)
    if not directory.is_dir():
        with writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
        for other in root.iterdir():
            with suppress(FileNotFoundError):
                # Only what is named like a run: `root` may hold what is not ours.
                is_run = other.name.isdecimal() and other.is_dir()
                if is_run and time.time() - other.stat().st_mtime > _DAY_S:
                    shutil.rmtree(other, ignore_errors=True)
    return directory


@dataclass(frozen=True)
class PieceStore:
    """The pieces of the model that a device holds, by place and digest.

    Devices may share it, as those of one simulation do: equal pieces are one file.

    Parameters
    ----------
    directory
        Where the files are.
    """

    directory: Path

    def read(self, place: int, content: str) -> list[npt.NDArray[Any]] | None:
        """Return the arrays of a piece; None if they are not here, or damaged.

        A damaged file is removed, so that the piece is written anew when it comes.
        """
        path = self._path(place, content)
        with suppress(SafetensorError):
            try:
                arrays = load_file(path)
            except FileNotFoundError:
                return None
            values = [arrays[key] for key in sorted(arrays)]
            if digest(values) == content:
                return values
        path.unlink(missing_ok=True)
        return None

    def write(
        self, place: int, content: str, arrays: Sequence[npt.NDArray[Any]]
    ) -> bool:
        """Keep the arrays of a piece, whose digest is known to be ``content``.

        Returns
        -------
        Whether they were not here yet.
        """
        path = self._path(place, content)
        if path.exists():
            return False
        _write(path, {f"{i:07d}": array for i, array in enumerate(arrays)})
        return True

    def keep_only(self, contents: Sequence[str]) -> None:
        """Remove what no device can have a use for any more.

        Parameters
        ----------
        contents
            Digest of what each place holds now. Besides, the latest others of each
            stay, `_OTHERS` of them: another device on this disk, which was idle
            meanwhile, may be sent how the piece has changed since, or be evaluating it.
        """
        kept = {self._path(place, content) for place, content in enumerate(contents)}
        others: dict[str, list[tuple[float, Path]]] = {}
        for path in self.directory.glob("piece-*-*"):
            if path not in kept:
                place = path.stem.rpartition("-")[0]
                with suppress(FileNotFoundError):
                    others.setdefault(place, []).append((path.stat().st_mtime, path))
        for written in others.values():
            for _, path in sorted(written, reverse=True)[_OTHERS:]:
                path.unlink(missing_ok=True)

    def _path(self, place: int, content: str) -> Path:
        # From the network: no other name may come to stand in a path.
        if not re.fullmatch("[0-9a-f]{32}", content):
            raise ValueError(f"{content!r} is no digest.")
        return self.directory / f"piece-{place:03d}-{content}.safetensors"


def complete(
    received: Sequence[npt.NDArray[Any]],
    manifest: Manifest,
    directory: Path | None,
    moves: Sequence[npt.NDArray[Any]] = (),
) -> list[npt.NDArray[Any]]:
    """Put a model together from what a message holds and what it left out.

    Parameters
    ----------
    received
        The message's arrays, in its order.
    manifest
        The message's manifest.
    directory
        Where the device keeps its copies, which afterwards are of this model; None if
        it keeps none.
    moves
        The changes that the message holds, in its order.

    Returns
    -------
    All arrays, in the server's order; the digest of every piece is the manifest's.

    Raises
    ------
    MalformedManifest
        The arrays are not those that the manifest says were sent.
    LostCopy
        The device lacks a piece that was left out, or that one has changed from; or
        the change does not lead to what the manifest says.
    """
    sent = manifest.sent_arrays(received)
    moved = dict(zip(manifest.moved_positions, moves, strict=True))
    store = None if directory is None else PieceStore(directory)
    arrays: dict[int, npt.NDArray[Any]] = {}
    missing = []
    has_grown = False
    for place, piece in enumerate(manifest.pieces):
        if piece.sent and piece.base is None:
            values = [sent[position] for position in piece.positions]
            if store is not None:
                has_grown |= store.write(place, piece.digest, values)
        else:
            content = piece.base or piece.digest
            held = None if store is None else store.read(place, content)
            if held is None or len(held) != len(piece.positions):
                missing.append(content)
                continue
            values = held
            if piece.base is not None and store is not None:
                steps = [moved[position] for position in piece.positions]
                values = [*map(moved_by, held, steps)]
                if digest(values) != piece.digest:
                    missing.append(piece.digest)
                    continue
                has_grown |= store.write(place, piece.digest, values)
        arrays |= zip(piece.positions, values, strict=True)
    if missing:
        raise LostCopy(
            f"{len(missing)} of {len(manifest.pieces)} pieces of the model, such as "
            f"{missing[0]}, are neither in the message nor in {directory}."
        )
    if store is not None and has_grown:
        store.keep_only([piece.digest for piece in manifest.pieces])
    return [arrays[position] for position in range(manifest.num_arrays)]


@dataclass(frozen=True)
class Residuals:
    """What a device's coarse codecs have left out so far, by part of the model.

    The residual of a part (a block, or the head) belongs to this device: it is what
    this device's data said about the part and the server was not told. So it stays here
    while another device has the block, and is added when the block comes back. By then
    the weights have moved, and after `max_rounds` rounds it is dropped.

    How long is long enough depends on the codec. Measured on a residual MLP of 6 blocks
    and 6 devices that meet at random (80 AdamW steps, mean loss of 3 seeds): with
    "topk:0.01" no residual 1.00, kept for 3 rounds 0.96, for 10 rounds 0.94, for ever
    0.93; with "int8" no difference; "topk:0.1" learns as well without (0.82).

    Parameters
    ----------
    directory
        Where the files are; each run has its own, see `run_store`.
    device
        The device's name: in a simulation several share the directory.
    max_rounds
        Rounds after which a residual is dropped. At most so many blocks' residuals are
        on the disk, since a device has one block a round.
    """

    directory: Path
    device: str
    max_rounds: int = 10

    def take(self, part: str, server_round: int) -> dict[str, Float32Array]:
        """Return a part's residual, by parameter, and forget it; empty if none holds.

        Parameters
        ----------
        part
            Name of the part, ``"block-3"`` or ``"head"``.
        server_round
            The round that it is wanted in.
        """
        residual: dict[str, Float32Array] = {}
        for path, written in self._files():
            mine = path.name.startswith(f"{self._prefix}-{part}-")
            age = server_round - written
            if mine and 0 < age <= self.max_rounds:
                with suppress(FileNotFoundError, SafetensorError):
                    residual = load_file(path)
            if mine or not 0 <= age <= self.max_rounds:
                path.unlink(missing_ok=True)
        return residual

    def put(self, part: str, server_round: int, residual: Mapping[str, Any]) -> None:
        """Keep what a part's update of this round left out."""
        if residual:
            path = self.directory / f"{self._prefix}-{part}-{server_round}.safetensors"
            _write(path, residual)

    @property
    def _prefix(self) -> str:
        # A name may hold what a path must not.
        return f"residual-{digest([np.frombuffer(self.device.encode(), np.uint8)])}"

    def _files(self) -> Iterable[tuple[Path, int]]:
        for path in sorted(self.directory.glob(f"{self._prefix}-*.safetensors")):
            yield path, int(path.stem.rpartition("-")[2])


def _write(path: Path, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    # Devices that share a directory may write the same file at the same time.
    with replacing(path, shared=True) as unfinished:
        save_file({k: np.asarray(v, order="C") for k, v in arrays.items()}, unfinished)
