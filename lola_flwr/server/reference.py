"""What up-to-date devices hold, where the model comes down as coded changes.

The server keeps the values that its devices hold, the *reference*. Each round it
encodes by how much its own differ from these, decodes that as the devices will, and
adds it: the reference is the devices' model bit for bit, and what the code has left out
is part of the next change (*error feedback*). Devices that hold the reference of the
round before are sent the change; all others the reference itself, whose values are
rounded to bfloat16 for that: in half the bytes it comes as it is.

References
----------
.. [1] Tang, Yu, Lian, Zhang, Liu, "DoubleSqueeze: Parallel Stochastic Gradient Descent
   with Double-Pass Error-Compensated Compression", arXiv:1905.05957.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lola_flwr.arrays import Float32Arrays
from lola_flwr.run.checkpoint import Snapshot
from lola_flwr.wire.codec import codec_named
from lola_flwr.wire.npy import WireArray
from lola_flwr.wire.packing import WHOLE_CODEC, moved_by, pack
from lola_flwr.wire.versions import ModelVersion, Versions, digest

# Prefix, in a snapshot, of the reference's values.
_SENT = "sent/"


class Reference:
    """The values that up-to-date devices hold.

    Parameters
    ----------
    codec
        Name of the codec that changes travel in.
    versions
        Tells versions of the model by its arrays.
    """

    def __init__(self, codec: str, versions: Versions) -> None:
        self._name, self._codec = codec, codec_named(codec)
        self._versions = versions
        self._values: dict[str, np.ndarray] = {}
        # By piece: digest of the server's values that were encoded last.
        self._encoded: tuple[str, ...] = ()
        self._version: ModelVersion | None = None
        self._moves: dict[str, WireArray] = {}

    def advance(self, values: Float32Arrays) -> ModelVersion:
        """Bring the reference to the server's values, as near as the codec does.

        Parameters
        ----------
        values
            All of the server's values, in the order of sending. Pieces that have not
            changed since they were encoded are left as they are.

        Returns
        -------
        The version that devices are to hold; its ``bases`` are those of before.
        """
        now = self._versions.of([*values.values()])
        if not self._values:
            self._values = {n: moved_by(v, np.zeros_like(v)) for n, v in values.items()}
            self._encoded, self._version = now.digests, self._of_values()
            return self._version
        before = self._version or self._of_values()
        names = [*values]
        digests, bases = [*before.digests], [*before.bases]
        for place, positions in enumerate(now.pieces):
            if now.digests[place] == self._encoded[place]:
                continue
            piece = [names[position] for position in positions]
            for name in piece:
                move = self._codec.encode(values[name] - self._values[name])
                self._moves[name] = move
                shape = values[name].shape
                # A new array: the old one may be on its way to a checkpoint.
                change = self._codec.decode(move, shape)
                self._values[name] = moved_by(self._values[name], change)
            bases[place] = before.digests[place]
            digests[place] = digest(self._values[name] for name in piece)
        self._encoded = now.digests
        self._version = replace(before, digests=tuple(digests), bases=tuple(bases))
        return self._version

    def _of_values(self) -> ModelVersion:
        version = self._versions.of([*self._values.values()])
        return replace(version, codec=self._name, whole_codec=WHOLE_CODEC)

    def packed(self, names: Sequence[str], codec: str = "fp32") -> WireArray:
        """Return the reference's values of some parameters in one array."""
        whole = codec_named(codec)
        return pack({name: whole.encode(self._values[name]) for name in names})

    def packed_moves(self, names: Sequence[str]) -> WireArray:
        """Return the last changes of some parameters, encoded, in one array."""
        return pack({name: self._moves[name] for name in names})

    def forget(self) -> None:
        """Begin anew: the server's next values are sent as they are."""
        self._values, self._moves = {}, {}
        self._encoded, self._version = (), None

    def snapshot(self) -> Snapshot:
        """Return what a run that goes on has to know."""
        arrays = {_SENT + name: values for name, values in self._values.items()}
        return Snapshot(arrays, {"encoded": [*self._encoded]})

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot, which may hold more; no device holds anything then."""
        self.forget()
        self._values = {
            # Those of earlier versions are not rounded.
            name.removeprefix(_SENT): moved_by(values, np.zeros_like(values))
            for name, values in snapshot.arrays.items()
            if name.startswith(_SENT)
        }
        # A run that was begun without has none.
        self._encoded = tuple(snapshot.values.get("encoded", ()))
