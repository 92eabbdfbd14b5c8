"""What the server knows of the devices that are there."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from lola_flwr.randomness import rng_for
from lola_flwr.server.absences import Absences
from lola_flwr.system.devices import DeviceProfile, InvalidProfile


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """The devices of a run, as far as the server knows them.

    Profiles belong to the ids under which devices are connected now; what was learned
    of devices belongs to their names, and outlives a connection.

    Parameters
    ----------
    profiles
        Profiles of the devices that are there, by device id.
    silent
        Who did not tell its profile lately, by device id.
    absences
        Who failed lately, by the device's name.
    """

    profiles: Mapping[str, DeviceProfile] = field(default_factory=dict)
    silent: Absences = field(default_factory=Absences)
    absences: Absences = field(default_factory=Absences)

    def met(self, device_ids: Iterable[str]) -> Fleet:
        """Take note of who is there.

        The profiles of devices that are gone are forgotten: a device that comes back
        under another id may use its name again.
        """
        known = self.profiles
        return replace(self, profiles={d: known[d] for d in device_ids if d in known})

    def to_ask(self, server_round: int, device_ids: Iterable[str]) -> list[str]:
        """Return the devices that are to be asked for their profiles.

        Those whose profile is not known, and that do not rest: a device that was asked
        and did not answer would else cost each round the wait for its answer.
        """
        return [
            device
            for device in device_ids
            if device not in self.profiles
            and self.silent.memory_limit(server_round, device) > 0
        ]

    def answered(
        self, server_round: int, asked: Iterable[str], answered: Collection[str]
    ) -> Fleet:
        """Take note of which devices, of those asked for their profiles, answered."""
        outcomes = {device: None if device in answered else 0.0 for device in asked}
        return replace(self, silent=self.silent.after(server_round, outcomes))

    def with_device(
        self,
        device_id: str,
        properties: Mapping[str, object],
        assumed: DeviceProfile | None = None,
    ) -> Fleet:
        """Take in the profile that a device reported.

        Parameters
        ----------
        device_id
            The device.
        properties
            What it reported; empty, if nothing.
        assumed
            Profile of devices that report nothing, but for its name; None: such devices
            stay unknown.

        Raises
        ------
        InvalidProfile
            The profile cannot be believed, or its name belongs to another device.
        """
        own_name = f"node {device_id}"[:64]
        if not properties and assumed is not None:
            profile = replace(assumed, name=own_name)
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
        return replace(self, profiles={**self.profiles, device_id: profile})

    def known(self, device_ids: Iterable[str]) -> list[str]:
        """Return the devices whose profile is known, ordered by name.

        Ids differ from run to run; names do not, and make runs repeatable.
        """
        known = [device for device in device_ids if device in self.profiles]
        return sorted(known, key=lambda device: self.profiles[device].name)

    def rested(self, server_round: int, device_ids: Iterable[str]) -> list[str]:
        """Return the known ones but for those that rest after a failure.

        If all do, they are all returned.
        """
        known = self.known(device_ids)
        rested = [
            device
            for device in known
            if self.absences.memory_limit(server_round, self.profiles[device].name) > 0
        ]
        return rested or known

    def after(self, server_round: int, outcomes: Mapping[str, float | None]) -> Fleet:
        """Take note of who did its part (None), and of the memory that others lacked.

        Parameters
        ----------
        server_round
            The round.
        outcomes
            By device id.
        """
        named = {
            self.profiles[device].name: lacked
            for device, lacked in outcomes.items()
            if device in self.profiles
        }
        return replace(self, absences=self.absences.after(server_round, named))

    def draw(
        self,
        seed: int,
        purpose: str,
        server_round: int,
        device_ids: Iterable[str],
        count: int,
    ) -> list[str]:
        """Draw devices: a function of seed, purpose, round and names."""
        names = {d: profile.name for d, profile in self.profiles.items()}
        ordered = sorted(device_ids, key=lambda device: names.get(device, device))
        rng = rng_for(seed, purpose, server_round)
        drawn = rng.permutation(len(ordered))[:count]
        return [ordered[index] for index in sorted(drawn)]
