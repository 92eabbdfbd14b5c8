"""The model that a device was sent: as it is, by what has changed, or by how much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt

from lola_flwr.device.store import complete
from lola_flwr.wire.codec import codec_named
from lola_flwr.wire.packing import received_moves, received_values
from lola_flwr.wire.versions import Manifest


def sent_model(
    values: Mapping[str, npt.NDArray[Any]],
    manifest_text: str | None,
    shapes: Mapping[str, Sequence[int]],
    directory: Path | None,
) -> tuple[list[npt.NDArray[Any]], str | None]:
    """Put together what the server sent.

    Parameters
    ----------
    values
        The message's arrays, by name.
    manifest_text
        What it leaves out; None: nothing.
    shapes
        Shapes of all values that the device is to have, by name, in the server's order.
    directory
        Where the device keeps its copies; None if it keeps none.

    Returns
    -------
    All values, in the server's order, and the version that is now held, if any.

    Raises
    ------
    UserError
        The values are those of another model, or of no known codec.
    MalformedManifest
        They are not those that the manifest says were sent.
    LostCopy
        The device lacks what was left out.
    """
    if manifest_text is None:
        return [*received_values(values, shapes).values()], None
    names = tuple(shapes)
    manifest = Manifest.from_text(manifest_text)

    def shapes_of(some: Sequence[str]) -> dict[str, Sequence[int]]:
        return {name: shapes[name] for name in some}

    whole = codec_named(manifest.whole_codec or "fp32")
    sent = shapes_of(manifest.sent_names(names))
    received = received_values(values, sent, whole)
    moves: Mapping[str, npt.NDArray[Any]] = {}
    if moved := manifest.moved_names(names):
        codec = codec_named(manifest.codec)
        moves = received_moves(values, codec, shapes_of(moved))
    arrays = complete([*received.values()], manifest, directory, [*moves.values()])
    return arrays, None if directory is None else manifest.version
