"""The server's memory of which versions of the model's pieces its devices hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from lola_flwr.wire.versions import Manifest, ModelVersion, Piece


@dataclass(frozen=True)
class HeldVersions:
    """The server's memory of what each device holds.

    Parameters
    ----------
    of_device
        Digests of the pieces that a device holds, by its id.
    """

    of_device: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def manifest(self, device_id: str, version: ModelVersion) -> Manifest:
        """Return the manifest of a message that sends a device what it lacks.

        Parameters
        ----------
        device_id
            The device.
        version
            What it is to hold then.
        """
        held = self.of_device.get(device_id, ())
        pieces = []
        for content, positions, base in zip(
            version.digests, version.pieces, version.bases, strict=True
        ):
            sent = content not in held
            piece = Piece(content, positions, sent)
            if sent and base in held:
                piece = replace(piece, base=base, codec=version.codec)
            elif sent:
                piece = replace(piece, codec=version.whole_codec)
            pieces.append(piece)
        return Manifest(tuple(pieces))

    def acknowledged(
        self, device_id: str, manifest: Manifest, version: str | None
    ) -> HeldVersions:
        """Take in which version a device says it holds, after it was sent one.

        Parameters
        ----------
        device_id
            The device.
        manifest
            What it was sent.
        version
            What it says; None if it keeps nothing.
        """
        if version != manifest.version:
            return self.without(device_id)
        digests = tuple(piece.digest for piece in manifest.pieces)
        return HeldVersions({**self.of_device, device_id: digests})

    def without(self, device_id: str) -> HeldVersions:
        """Take in that a device holds nothing."""
        return self.of_these(d for d in self.of_device if d != device_id)

    def of_these(self, device_ids: Iterable[str]) -> HeldVersions:
        """Forget all other devices."""
        held = self.of_device
        return HeldVersions({d: held[d] for d in device_ids if d in held})
