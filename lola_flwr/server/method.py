"""What the strategies' loop asks of a method of training in rounds."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Protocol, TypeVar

from lola_flwr.model.blocks import BlockPartition
from lola_flwr.run.records import Record

Plan = TypeVar("Plan")
Answers = TypeVar("Answers", contravariant=True)


class Register(Protocol):
    """Keeps the profiles of the devices that are there."""

    def meet_devices(self, server_round: int, device_ids: Iterable[str]) -> list[str]:
        """Take note of who is there; return those to ask for their profiles."""

    def add_device(self, device_id: str, properties: Mapping[str, object]) -> None:
        """Take in a device's profile, or raise `InvalidProfile`."""

    def note_answers(
        self, server_round: int, asked: Iterable[str], answered: Collection[str]
    ) -> None:
        """Take note of which devices, of those asked for their profiles, answered."""


class Method(Register, Protocol[Plan, Answers]):
    """A method of training in rounds: `Coordinator`, or D2FT's `SpreadTrainer`."""

    @property
    def partition(self) -> BlockPartition:
        """Blocks of the model."""

    @property
    def server_round(self) -> int:
        """Last complete round; 0 before the first."""

    def plan_round(self, server_round: int, device_ids: Iterable[str]) -> Plan:
        """Decide who does what, or raise `UserError`."""

    def complete_round(self, plan: Plan, answers: Answers) -> Record:
        """Take in what the devices of a plan answer, and step the model."""

    def skip_round(self, server_round: int, reason: str) -> Record:
        """Return the record of a round that nobody is asked to take part in."""
