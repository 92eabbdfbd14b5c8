"""What the server decided about one round: who computes what, and how."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lola_flwr.allocation import Allocation, AllocationProblem
from lola_flwr.system.devices import DeviceProfile
from lola_flwr.wire.payload import Payloads
from lola_flwr.wire.records import Assignment
from lola_flwr.wire.versions import Manifest


@dataclass(frozen=True, kw_only=True, eq=False)
class RoundPlan:
    """Who computes what in one round.

    Parameters
    ----------
    server_round
        Round, from 1.
    device_ids
        The K devices in the order of the problem's rows.
    profiles
        Their profiles, by device id.
    num_excluded
        Devices that were left out where all others take part: they have not the memory
        for a block, or rest after failures.
    problem, allocation
        What was solved, and the solution.
    assignments
        Assignment of each active device, by device id.
    claimed_s
        Seconds that each active device takes to compute, by its profile alone, by
        device id.
    payloads
        What the devices may be told to upload.
    codec_level
        Codec of each device, an index into ``payloads.codecs``, shape (K,).
    manifests
        Which of the model's arrays each active device is sent, by device id; without
        one a device is sent all of them.
    """

    server_round: int
    device_ids: tuple[str, ...]
    profiles: Mapping[str, DeviceProfile]
    num_excluded: int
    problem: AllocationProblem
    allocation: Allocation
    assignments: Mapping[str, Assignment]
    claimed_s: Mapping[str, float]
    payloads: Payloads
    codec_level: npt.NDArray[np.int64]
    manifests: Mapping[str, Manifest]

    def active(self) -> Iterator[tuple[int, str, int]]:
        """Give row, id and block of each active device, in the order of the rows."""
        blocks = self.allocation.block_of_device.tolist()
        for row, (device, block) in enumerate(
            zip(self.device_ids, blocks, strict=True)
        ):
            if block >= 0:
                yield row, device, block

    def leaves_out(self, device_id: str) -> bool:
        """Tell whether a device is not sent the whole model."""
        manifest = self.manifests.get(device_id)
        return manifest is not None and not all(p.sent for p in manifest.pieces)

    def sent_names(self, device_id: str, names: Sequence[str]) -> tuple[str, ...]:
        """Return the names, out of all in order, of what a device is sent."""
        manifest = self.manifests.get(device_id)
        return tuple(names) if manifest is None else manifest.sent_names(names)
