"""What the server decided about one round: who computes what, and how."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from lola_flwr.allocation import Allocation, AllocationProblem
from lola_flwr.planning import SolvedRound
from lola_flwr.system.devices import DeviceProfile
from lola_flwr.system.gradient_noise import step_length
from lola_flwr.wire.components import Drawn
from lola_flwr.wire.records import Assignment
from lola_flwr.wire.versions import Manifest


@dataclass(frozen=True, kw_only=True, eq=False)
class RoundPlan:
    """Who computes what in one round.

    Parameters
    ----------
    device_ids
        The k devices in the order of the problem's rows.
    solved
        What was solved, and the solution.
    assignments
        Assignment of each active device, by device id.
    manifests
        Which of the model's arrays each active device is sent, by device id; without
        one a device is sent all of them.
    overheard
        What idle devices that hear the broadcast have by it, by device id: all that
        they lacked.
    drawn
        Which components of its adapter a device sends, and what each counts, by device
        id; without an entry it sends all.
    """

    device_ids: tuple[str, ...]
    solved: SolvedRound
    assignments: Mapping[str, Assignment]
    manifests: Mapping[str, Manifest]
    overheard: Mapping[str, Manifest]
    drawn: Mapping[str, Drawn] = field(default_factory=dict)

    @property
    def server_round(self) -> int:
        """Round, from 1."""
        return self.solved.server_round

    @property
    def problem(self) -> AllocationProblem:
        """What was solved."""
        return self.solved.problem

    @property
    def allocation(self) -> Allocation:
        """The solution."""
        return self.solved.allocation

    @cached_property
    def profiles(self) -> Mapping[str, DeviceProfile]:
        """Profiles of the devices, by device id."""
        return dict(zip(self.device_ids, self.solved.stated.profiles, strict=True))

    @cached_property
    def claimed_s(self) -> Mapping[str, float]:
        """Seconds that each active device takes to compute, by its profile alone."""
        claimed_s = self.solved.stated.claimed_s
        return {d: float(claimed_s[row, block]) for row, d, block in self.active()}

    @cached_property
    def planned_s(self) -> Mapping[str, float]:
        """Seconds that each active device should take until it has sent."""
        allocation, problem = self.allocation, self.problem
        sent_s = allocation.turn_s(problem) + allocation.upload_s(problem)
        return {
            d: float(problem.compute_s[row, block] + sent_s[row])
            for row, d, block in self.active()
        }

    def active(self) -> Iterator[tuple[int, str, int]]:
        """Give row, id and block of each active device, in the order of the rows."""
        for row, block in self.solved.active():
            yield row, self.device_ids[row], block

    def leaves_out(self, device_id: str) -> bool:
        """Tell whether a device is not sent the whole model."""
        manifest = self.manifests.get(device_id)
        return manifest is not None and manifest.leaves_out

    def sent_names(self, device_id: str, names: Sequence[str]) -> tuple[str, ...]:
        """Return the names, out of all in order, of what a device is sent."""
        manifest = self.manifests.get(device_id)
        return tuple(names) if manifest is None else manifest.sent_names(names)

    def length_by_noise(self, device_id: str) -> float:
        """Return how many times as long noise lets a device's update be, as expected.

        The gradient of B examples is ``sqrt(1 + S / B)`` times as long as that of very
        many, S its noise scale; here the blocks' median, which is known best. Where all
        devices have one batch, none is told apart.
        """
        solved = self.solved
        if solved.batch_size is None or solved.noise_scale is None:
            return 1.0
        row = self.device_ids.index(device_id)
        scale = float(np.median([solved.noise_scale[b] for _, b in solved.active()]))
        return math.sqrt(1.0 + scale / solved.batch_size[row])

    def step_lengths(
        self, device_ids: Iterable[str], factor: float = 1.0
    ) -> dict[int, float]:
        """Return how long the steps of blocks are, where batches are chosen.

        Parameters
        ----------
        device_ids
            The devices whose updates they follow. What several send of one block is as
            one of all their examples.
        factor
            What all of them are multiplied by.
        """
        solved = self.solved
        if solved.batch_size is None or solved.noise_scale is None:
            return {}
        examples: dict[int, int] = {}
        for device_id in device_ids:
            row = self.device_ids.index(device_id)
            for block in self.assignments[device_id].blocks:
                examples[block] = examples.get(block, 0) + int(solved.batch_size[row])
        noise_scale = solved.noise_scale
        return {
            block: factor * step_length(count, float(noise_scale[block]))
            for block, count in examples.items()
        }

    @property
    def whole_codec(self) -> str:
        """Name of the codec that arrays travel in; "": as they are."""
        return max((m.whole_codec for m in self.manifests.values()), default="")

    def moved_names(self, device_id: str, names: Sequence[str]) -> tuple[str, ...]:
        """Return the names of that of which a device is sent the changes."""
        manifest = self.manifests.get(device_id)
        return () if manifest is None else manifest.moved_names(names)
