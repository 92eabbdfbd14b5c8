"""What the server knows of a run's devices: what they say, and what it has learned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from lola_flwr.randomness import rng_for
from lola_flwr.server.absences import Absences
from lola_flwr.server.model import ServedModel
from lola_flwr.server.round.intake import RoundReplies
from lola_flwr.server.round.plan import RoundPlan
from lola_flwr.server.state import RunState
from lola_flwr.system.devices import DeviceProfile, InvalidProfile
from lola_flwr.system.estimation import (
    ComputeEstimate,
    Observation,
    RateEstimate,
    RateObservation,
)
from lola_flwr.wire.versions import HeldVersions, Manifest


class Fleet:
    """The devices of a run, as far as the server knows them.

    Profiles belong to the ids under which devices are connected now; what was learned
    of devices belongs to their names, and outlives a connection.

    Parameters
    ----------
    assumed_profile
        Profile of devices that report none, but for its name; None: they stay unknown.
    correct_profiles
        Whether observed times correct what devices claim.
    held
        Which versions of the model they hold; None: they keep no copies.
    seed
        Seed of the run.
    """

    def __init__(
        self,
        *,
        assumed_profile: DeviceProfile | None = None,
        correct_profiles: bool = True,
        held: HeldVersions | None = None,
        seed: int = 0,
    ) -> None:
        self._assumed_profile = assumed_profile
        self._correct_profiles = correct_profiles
        self._held = held
        self._seed = seed
        self.profiles: dict[str, DeviceProfile] = {}
        self.estimate = ComputeEstimate()
        self.rates = RateEstimate()
        # How often a device's update of a block was accepted, by name and block.
        self.meetings: Counter[tuple[str, int]] = Counter()
        self.absences = Absences()

    def restore(self, state: RunState) -> None:
        """Take over what an earlier process of the run knew."""
        self.profiles = dict(state.profiles)
        self.estimate = state.estimate
        self.rates = state.rates
        self.meetings = state.meetings
        self.absences = state.absences

    # --- who is there ----------------------------------------------------------------

    def meet(self, device_ids: Iterable[str]) -> list[str]:
        """Take note of who is there; return those whose profile is not known yet.

        The profiles of devices that are gone are forgotten: a device that comes back
        under another id may use its name again.
        """
        there = list(device_ids)
        self.profiles = {d: self.profiles[d] for d in there if d in self.profiles}
        if self._held is not None:
            self._held.keep_only(there)
        return [device for device in there if device not in self.profiles]

    def add(self, device_id: str, properties: Mapping[str, object]) -> None:
        """Take in the profile that a device reported; none if it is empty.

        Raises
        ------
        InvalidProfile
            The profile cannot be believed, or its name belongs to another device.
        """
        own_name = f"node {device_id}"[:64]
        if not properties and self._assumed_profile is not None:
            profile = replace(self._assumed_profile, name=own_name)
        else:
            profile = DeviceProfile.from_properties(properties)
        if profile.name.startswith("node ") and profile.name != own_name:
            raise InvalidProfile(
                f"name={profile.name!r} is reserved for the device of that id; give "
                "this one another."
            )
        for other_id, other in self.profiles.items():
            if other.name == profile.name and other_id != device_id:
                raise InvalidProfile(
                    f"name={profile.name!r} is taken by another device; give each "
                    "device a name of its own."
                )
        self.profiles[device_id] = profile

    def known(self, device_ids: Iterable[str]) -> list[str]:
        """Return the devices whose profile is known, ordered by name.

        Ids differ from run to run; names do not, and make runs repeatable.
        """
        known = [device for device in device_ids if device in self.profiles]
        return sorted(known, key=lambda device: self.profiles[device].name)

    def draw_evaluators(
        self, server_round: int, device_ids: Iterable[str], count: int
    ) -> list[str]:
        """Draw devices to evaluate the model: a function of seed, round and names."""
        names = {d: profile.name for d, profile in self.profiles.items()}
        ordered = sorted(device_ids, key=lambda device: names.get(device, device))
        rng = rng_for(self._seed, "evaluation", server_round)
        drawn = rng.permutation(len(ordered))[:count]
        return [ordered[index] for index in sorted(drawn)]

    # --- what was learned ------------------------------------------------------------

    def meetings_of(self, names: Sequence[str], num_blocks: int) -> list[list[int]]:
        """Return how often each device's update of each block was accepted, [K, N]."""
        return [[self.meetings[name, n] for n in range(num_blocks)] for name in names]

    def block_updates(self, num_blocks: int) -> list[int]:
        """Return how many updates of each block have been accepted, [N]."""
        updates: Counter[int] = Counter()
        for (_, block), count in self.meetings.items():
            updates[block] += count
        return [updates[block] for block in range(num_blocks)]

    def manifests(
        self, device_ids: Iterable[str], model: ServedModel
    ) -> dict[str, Manifest]:
        """Return what of the model devices are to be sent; empty: everything."""
        if self._held is None:
            return {}
        return self._held.manifests(device_ids, [*model.arrays().values()])

    def learn(self, plan: RoundPlan, replies: RoundReplies) -> None:
        """Take in how a round went: for times, rates, rotation, copies and rests."""
        observations = []
        rates = []
        if self._held is not None:
            for device in replies.lost_copies:
                self._held.forget(device)
        for device, accepted in replies.accepted.items():
            report, upload = accepted.report, accepted.upload
            if self._held is not None:
                self._held.acknowledge(device, plan.manifests[device], report.held)
            profile = plan.profiles[device]
            self.meetings[profile.name, report.block_index] += 1
            if (
                profile.uplink_bps is not None
                and upload.upload_s is not None
                # A few numbers take no longer than any message: no link shows.
                and not accepted.update.zeroth_order
            ):
                rates.append(
                    RateObservation(
                        device=profile.name,
                        claimed_bps=profile.uplink_bps,
                        payload_bits=upload.payload_bits,
                        upload_s=upload.upload_s,
                        share=plan.assignments[device].share,
                        held=report.uplink_limit is not None,
                    )
                )
            if report.compute_s is not None:
                observations.append(
                    Observation(
                        profile.name,
                        report.block_index,
                        plan.claimed_s[device],
                        report.compute_s,
                    )
                )
        if self._correct_profiles:
            self.estimate = self.estimate.update(observations)
            self.rates = self.rates.update(rates)
        self.absences = self.absences.after(
            plan.server_round,
            {
                plan.profiles[device].name: lacked
                for device, lacked in replies.lacked_bytes.items()
            },
        )
