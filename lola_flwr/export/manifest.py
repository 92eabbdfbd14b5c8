"""What a directory of exported programs holds, checked before anything runs.

The manifest is JSON. A device needs nothing else to know what goes into a program, what
comes out, and for which model it was made; the native runner reads the same file.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError

from lola_flwr.errors import UserError, brief
from lola_flwr.machine.files import replacing
from lola_flwr.model.blocks import BlockPartition

VERSION = 1
MANIFEST_FILE = "manifest.json"
FORMAT: Literal["lola-flwr-export"] = "lola-flwr-export"

_HASHED_AT_ONCE_BYTES = 1 << 20


class _Strict:
    """Fields that a manifest does not have are refused, not ignored."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True)
class ArraySpec(_Strict):
    """An array that goes into a program or comes out of it.

    Parameters
    ----------
    name
        Its name: a parameter's, an argument's of the model, or ``"loss"``.
    shape
        Its shape.
    dtype
        Its type, as numpy writes it: ``"<f4"``.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class ValueSpec(ArraySpec):
    """A trainable array.

    Parameters
    ----------
    offset_bytes
        Where it begins in the one array of float32 values that a device is sent: there
        they are in the order of their names.
    """

    offset_bytes: int


@dataclass(frozen=True)
class BatchSpec(ArraySpec):
    """An argument of the model.

    Parameters
    ----------
    fill
        What stands in the columns behind a sequence that is shorter than the program's;
        None where its second dimension does not count tokens.
    """

    fill: int | float | None


@dataclass(frozen=True)
class FileSpec(_Strict):
    """A file beside the manifest.

    Parameters
    ----------
    name
        Its name.
    num_bytes
        Its size.
    sha256
        Its digest.
    """

    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class ProgramSpec(_Strict):
    """The program that trains one block.

    Parameters
    ----------
    block
        The block, 0 nearest the input.
    file
        The program.
    gradients
        Gradients that it returns behind the loss, in order: those of the block and of
        the head.
    operations
        Floating-point operations of a step, by the cost model.
    memory_bytes
        Peak of a step by the cost model, which counts PyTorch: what a server takes the
        block to need.
    arena_bytes
        What the program itself sets aside for all that it computes.
    """

    block: int
    file: FileSpec
    gradients: tuple[ArraySpec, ...]
    operations: float
    memory_bytes: float
    arena_bytes: int


@dataclass(frozen=True)
class ExportManifest(_Strict):
    """What was exported.

    Parameters
    ----------
    format, version
        What this is, and in which form.
    runtime
        What the programs were made with, and its version.
    model
        What the model was called when it was exported.
    base_fingerprint
        Digest of the frozen weights, which an assignment names, too.
    dropout
        Programs compute as in evaluation mode.
    batch_size, sequence_length
        Examples of a mini-batch, and tokens of each.
    takes_fewer_examples, takes_fewer_tokens
        Whether a batch that is smaller, or whose sequences are shorter, may be filled
        up without a change to loss and gradients. It was tried on the model.
    blocks, head
        Names of the parameters of each block and of the head.
    values
        What goes into every program first, in order: all that is trained.
    batch
        What goes in behind the values, in order.
    frozen
        The file of frozen weights, which all programs share.
    programs
        A program for each block that was asked for.
    """

    format: Literal["lola-flwr-export"]
    version: int
    runtime: str
    model: str
    base_fingerprint: str
    dropout: Literal["off"]
    batch_size: int
    sequence_length: int
    takes_fewer_examples: bool
    takes_fewer_tokens: bool
    blocks: tuple[tuple[str, ...], ...]
    head: tuple[str, ...]
    values: tuple[ValueSpec, ...]
    batch: tuple[BatchSpec, ...]
    frozen: FileSpec
    programs: tuple[ProgramSpec, ...]

    @property
    def partition(self) -> BlockPartition:
        """Blocks and head; what is frozen has no names here."""
        return BlockPartition(self.blocks, self.head, frozen=())

    @property
    def inputs(self) -> tuple[ArraySpec, ...]:
        """All that goes into a program, in order."""
        return (*self.values, *self.batch)

    def program(self, block: int) -> ProgramSpec:
        """Return the program of a block.

        Raises
        ------
        UserError
            There is none.
        """
        for program in self.programs:
            if program.block == block:
                return program
        there = ", ".join(str(program.block) for program in self.programs)
        raise UserError(
            f"No program trains block {block} of {self.model!r}; there are programs of "
            f"blocks {there}. Export that one, too: lola-flwr export --blocks {block}."
        )

    def to_json(self) -> str:
        """Return the manifest as text."""
        values = _ADAPTER.dump_python(self, mode="json")
        return json.dumps(values, indent=1, allow_nan=False) + "\n"


_ADAPTER: TypeAdapter[ExportManifest] = TypeAdapter(ExportManifest)


def manifest_schema() -> dict[str, Any]:
    """Return the JSON schema of manifests."""
    return _ADAPTER.json_schema()


def value_specs(shapes: Mapping[str, Sequence[int]]) -> tuple[ValueSpec, ...]:
    """Describe trainable float32 arrays by name, in the order in which they go in."""
    offsets, end = {}, 0
    for name in sorted(shapes):
        offsets[name] = end
        end += 4 * math.prod(shapes[name])
    return tuple(
        ValueSpec(name, tuple(shape), "<f4", offsets[name])
        for name, shape in shapes.items()
    )


def file_spec(path: Path) -> FileSpec:
    """Describe a file."""
    return FileSpec(path.name, path.stat().st_size, _sha256(path))


def write_manifest(directory: Path, manifest: ExportManifest) -> None:
    """Write a manifest into the directory of its files."""
    with replacing(directory / MANIFEST_FILE) as path:
        path.write_text(manifest.to_json(), encoding="utf-8")


def read_manifest(directory: Path, *, fingerprint: str | None = None) -> ExportManifest:
    """Read a manifest, and check it and the files that it names.

    Parameters
    ----------
    directory
        Where it is.
    fingerprint
        Digest of the frozen weights that it has to be of (default: of any).

    Raises
    ------
    UserError
        There is none, it is of a later version or of another model, or a file is not
        the one that was exported.
    """
    path = directory / MANIFEST_FILE
    manifest = parse_manifest(_text(path), where=str(path))
    if fingerprint is not None and manifest.base_fingerprint != fingerprint:
        raise UserError(
            f"{path} is of other frozen weights than the server's "
            f"({manifest.base_fingerprint[:12]}... and {fingerprint[:12]}...); export "
            "the model that the run trains."
        )
    for spec in (manifest.frozen, *(program.file for program in manifest.programs)):
        _check_file(directory / spec.name, spec)
    return manifest


def parse_manifest(text: str, *, where: str) -> ExportManifest:
    """Read a manifest's text.

    Parameters
    ----------
    text
        The text.
    where
        What messages call it.

    Raises
    ------
    UserError
        It is none, or of a later version, or contradicts itself.
    """
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where} is no JSON ({error}); export anew.") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UserError(f"{where} is no manifest of lola-flwr export.")
    version = found.get("version")
    if version != VERSION:
        raise UserError(
            f"{where} is of version {brief(version)}, and this program reads version "
            f"{VERSION}; use the release that exported it, or export anew."
        )
    try:
        manifest = _ADAPTER.validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{where} is damaged at {place}: {first['msg']}; export anew."
        ) from None
    for wrong in _contradictions(manifest):
        raise UserError(f"{where} contradicts itself: {wrong}; export anew.")
    return manifest


def _contradictions(manifest: ExportManifest) -> Iterable[str]:
    partition = manifest.partition
    shapes = {value.name: value.shape for value in manifest.values}
    if tuple(shapes) != partition.trainable or len(shapes) != len(manifest.values):
        yield "its values are not those of its blocks and head"
    elif manifest.values != value_specs(shapes):
        yield "its values are not where its names put them"
    for program in manifest.programs:
        if not 0 <= program.block < partition.num_blocks:
            yield f"there is no block {program.block}"
            continue
        wanted = tuple(
            ArraySpec(name, shapes[name], "<f4")
            for name in partition.update_names(program.block)
            if name in shapes
        )
        if program.gradients != wanted:
            yield f"the gradients of block {program.block} are not those of its names"
    for spec in (manifest.frozen, *(program.file for program in manifest.programs)):
        if Path(spec.name).name != spec.name or spec.name in ("", ".", ".."):
            yield f"{brief(spec.name)} is no name of a file beside it"


def _check_file(path: Path, spec: FileSpec) -> None:
    try:
        is_whole = path.stat().st_size == spec.num_bytes and (
            _sha256(path) == spec.sha256
        )
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); copy the whole directory."
        ) from None
    if not is_whole:
        raise UserError(
            f"{path} is not the file that was exported: its size or SHA-256 differs "
            "from the manifest's; copy it anew, or export anew."
        )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); name a directory that lola-flwr export "
            "has written."
        ) from None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASHED_AT_ONCE_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
