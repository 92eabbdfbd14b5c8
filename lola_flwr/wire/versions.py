"""Which version of the model a device holds, and what it must be sent to hold the next.

A model's arrays, in the order in which they are sent, are divided into *pieces*: each
block, the head, and whatever else is sent. A piece's version is the digest of its
content. The server remembers which digests a device has said it holds, and leaves the
arrays of those pieces out of its message; a `Manifest` beside the message lists all
pieces, so that the device completes the model from its own copies, by digest: a piece
of another version can neither be taken for this one nor be trained on.

Nothing here relies on the server being right. A device that lacks a piece (it was
started anew, or cleared its disk) answers with an update of the kind ``"nothing"`` and
is sent everything in its next round; one that never says what it holds is always sent
everything.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from lola_flwr.errors import quoted
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.model.statistics import statistics_names

# Far more arrays than any model has: a text cannot make a device reserve more places.
_MOST_ARRAYS = 1_000_000
_RUN = "[0-9]{1,7}-[0-9]{1,7}"
_DIGEST = "[0-9a-f]{32}"
_PIECE = re.compile(
    rf"(\+?)({_DIGEST})(?:~([a-z0-9]{{1,9}})(?:~({_DIGEST}))?)?:"
    rf"({_RUN}(?:,{_RUN})*)"
)


class MalformedManifest(ValueError):
    """A text is no manifest, or not that of the arrays beside it."""


def digest(arrays: Iterable[npt.NDArray[Any]]) -> str:
    """Return the digest of some arrays' types, shapes and values, in their order.

    XXH3 of 128 bits: nobody finds two contents of one digest by chance, and a device
    that looks for them deceives only itself, as it may without. A device digests the
    whole model twice a round, for which SHA-256 takes 18 times as long.
    """
    hasher = xxhash.xxh3_128()
    for array in arrays:
        hasher.update(f"{array.dtype.str}{array.shape}".encode())
        # Only an array with a dimension can be seen as bytes.
        flat = np.ascontiguousarray(array).reshape(-1)
        hasher.update(flat.view(np.uint8).data)
    return hasher.hexdigest()


def model_pieces(
    partition: BlockPartition, names: Sequence[str]
) -> tuple[tuple[int, ...], ...]:
    """Divide arrays into blocks, head, running statistics, and the rest.

    Parameters
    ----------
    partition
        The model's blocks.
    names
        Names of the arrays in the order in which they are sent.

    Returns
    -------
    Positions of each piece's arrays among ``names``; no piece is empty.
    """
    place = {name: i for i, names in enumerate(partition.blocks) for name in names}
    place |= dict.fromkeys(partition.head, partition.num_blocks)
    place |= dict.fromkeys(statistics_names(names), partition.num_blocks + 1)
    pieces: dict[int, list[int]] = {}
    for position, name in enumerate(names):
        pieces.setdefault(place.get(name, partition.num_blocks + 2), []).append(
            position
        )
    return tuple(tuple(pieces[key]) for key in sorted(pieces))


@dataclass(frozen=True)
class Piece:
    """Arrays of one message that are sent, or left out, together.

    Parameters
    ----------
    digest
        Digest of their content.
    positions
        Where they stand among all arrays, in rising order.
    sent
        Whether the message holds them.
    base
        Digest of the content that the message holds the changes from; None: it holds
        the arrays themselves, or nothing.
    codec
        Name of the codec that the changes, or the arrays, travel in; "": arrays travel
        as they are.
    """

    digest: str
    positions: tuple[int, ...]
    sent: bool
    base: str | None = None
    codec: str = ""


@dataclass(frozen=True)
class Manifest:
    """What a model consists of, and which of it a message holds.

    Parameters
    ----------
    pieces
        All pieces; every position from 0 on belongs to just one of them.
    """

    pieces: tuple[Piece, ...]

    @property
    def version(self) -> str:
        """Name of this version of the whole model."""
        text = " ".join(piece.digest for piece in self.pieces)
        return xxhash.xxh3_128_hexdigest(text.encode())

    @property
    def num_arrays(self) -> int:
        """Number of arrays that the model consists of."""
        return sum(len(piece.positions) for piece in self.pieces)

    @property
    def codec(self) -> str:
        """Name of the codec of the changes that the message holds; "" without any.

        Raises
        ------
        MalformedManifest
            They are in several.
        """
        return _one_codec("Changes", (p.codec for p in self.pieces if p.base))

    @property
    def whole_codec(self) -> str:
        """Name of the codec of the arrays that it holds; "": they are as they are.

        Raises
        ------
        MalformedManifest
            They are in several.
        """
        sent = (p.codec for p in self.pieces if p.sent and p.base is None)
        return _one_codec("Arrays", sent)

    @property
    def leaves_out(self) -> bool:
        """Whether a device has to hold something to complete the model."""
        return any(not piece.sent or piece.base for piece in self.pieces)

    @property
    def sent_positions(self) -> tuple[int, ...]:
        """Positions of the arrays that the message holds, in its order."""
        sent = (p.positions for p in self.pieces if p.sent and p.base is None)
        return tuple(sorted(chain.from_iterable(sent)))

    @property
    def moved_positions(self) -> tuple[int, ...]:
        """Positions of the arrays whose changes the message holds, in its order."""
        moved = (p.positions for p in self.pieces if p.sent and p.base is not None)
        return tuple(sorted(chain.from_iterable(moved)))

    def sent_names(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return the names, out of all arrays' in order, of what the message holds.

        Raises
        ------
        MalformedManifest
            It is the manifest of another number of arrays.
        """
        return self._names_at(self.sent_positions, names)

    def moved_names(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return the names of those arrays whose changes the message holds.

        Raises
        ------
        MalformedManifest
            It is the manifest of another number of arrays.
        """
        return self._names_at(self.moved_positions, names)

    def _names_at(
        self, positions: Sequence[int], names: Sequence[str]
    ) -> tuple[str, ...]:
        if len(names) != self.num_arrays:
            raise MalformedManifest(
                f"The manifest is of {self.num_arrays} arrays; this model has "
                f"{len(names)}. Use the same model on server and device."
            )
        return tuple(names[position] for position in positions)

    def sent_arrays(
        self, received: Sequence[npt.NDArray[Any]]
    ) -> dict[int, npt.NDArray[Any]]:
        """Return the arrays of a message by position.

        Parameters
        ----------
        received
            The message's arrays, in its order.

        Raises
        ------
        MalformedManifest
            Another number of arrays was sent, or other ones.
        """
        positions = self.sent_positions
        if len(received) != len(positions):
            raise MalformedManifest(
                f"{len(received)} arrays received; the manifest says {len(positions)}."
            )
        arrays = dict(zip(positions, received, strict=True))
        for piece in self.pieces:
            if (
                piece.sent
                and piece.base is None
                and digest(arrays[i] for i in piece.positions) != piece.digest
            ):
                raise MalformedManifest(
                    f"The arrays received do not have the digest {piece.digest} that "
                    "the manifest states; something on the way has changed them."
                )
        return arrays

    def to_text(self) -> str:
        """Write it for the wire: ``+<digest>:0-15,32-35 ...``, where + means sent.

        Of changes their codec and the content that they are from follow,
        ``+<digest>~int8~<digest>:...``, and of arrays in a codec that.
        """
        return " ".join(
            f"{'+' * piece.sent}{piece.digest}"
            f"{f'~{piece.codec}' if piece.codec else ''}"
            f"{f'~{piece.base}' if piece.base else ''}:"
            + ",".join(f"{first}-{last}" for first, last in _runs(piece.positions))
            for piece in self.pieces
        )

    @classmethod
    def from_text(cls, text: str) -> Manifest:
        """Read what `to_text` wrote.

        Raises
        ------
        MalformedManifest
            The text is something else.
        """
        pieces, total = [], 0
        for word in text.split(" "):
            match = _PIECE.fullmatch(word)
            if match is None or (match[3] and not match[1]):
                raise MalformedManifest(f"{quoted(word)} describes no piece.")
            runs = [
                (int(first), int(last))
                for first, _, last in (
                    run.partition("-") for run in match[5].split(",")
                )
            ]
            total += sum(last - first + 1 for first, last in runs)
            if total > _MOST_ARRAYS or any(first > last for first, last in runs):
                raise MalformedManifest(f"{quoted(word)} has impossible positions.")
            positions = chain.from_iterable(range(a, b + 1) for a, b in runs)
            sent, content, codec, base, _ = match.groups()
            pieces.append(
                Piece(content, tuple(positions), bool(sent), base, codec or "")
            )
        all_positions = sorted(chain.from_iterable(p.positions for p in pieces))
        if all_positions != list(range(total)) or any(
            piece.positions != tuple(sorted(piece.positions)) for piece in pieces
        ):
            raise MalformedManifest("Every array must belong to just one piece.")
        return cls(tuple(pieces))


def _runs(positions: Sequence[int]) -> list[tuple[int, int]]:
    """Sum rising positions up as runs of (first, last)."""
    runs: list[tuple[int, int]] = []
    for position in positions:
        if runs and runs[-1][1] == position - 1:
            runs[-1] = (runs[-1][0], position)
        else:
            runs.append((position, position))
    return runs


def _one_codec(what: str, codecs: Iterable[str]) -> str:
    """Return the codec of what a message holds in one array."""
    names = {*codecs}
    if len(names) > 1:
        listed = ", ".join(name or "none" for name in sorted(names))
        raise MalformedManifest(f"{what} in several codecs: {listed}.")
    return names.pop() if names else ""


@dataclass(frozen=True)
class ModelVersion:
    """What one version of the model consists of.

    Parameters
    ----------
    pieces
        Positions of each piece's arrays, as `model_pieces` gives them.
    digests
        Digest of each piece.
    bases
        Digest of the content that each piece has changed from, where whoever holds that
        can be sent the change; None where nobody can.
    codec
        Name of the codec that changes travel in.
    whole_codec
        Name of the codec that arrays travel in, which says all of them; "": they travel
        as they are.
    """

    pieces: tuple[tuple[int, ...], ...]
    digests: tuple[str, ...]
    bases: tuple[str | None, ...] = ()
    codec: str = ""
    whole_codec: str = ""

    def __post_init__(self) -> None:
        """Without any, there are no changes to send."""
        object.__setattr__(self, "bases", self.bases or (None,) * len(self.pieces))


class Versions:
    """Tells versions of one model by its arrays.

    Parameters
    ----------
    pieces
        Positions of each piece's arrays, as `model_pieces` gives them.
    constants
        Arrays that never change, by position: their digests are computed once.
    """

    def __init__(
        self,
        pieces: Sequence[tuple[int, ...]],
        constants: Mapping[int, npt.NDArray[Any]] | None = None,
    ) -> None:
        self._pieces = tuple(pieces)
        constants = constants or {}
        self._constant = {
            piece: digest(constants[i] for i in piece)
            for piece in self._pieces
            if constants.keys() >= set(piece)
        }

    def of(self, arrays: Sequence[npt.NDArray[Any]]) -> ModelVersion:
        """Return the version that all arrays, in order, are."""
        digests = [
            self._constant.get(piece) or digest(arrays[i] for i in piece)
            for piece in self._pieces
        ]
        return ModelVersion(self._pieces, tuple(digests))
