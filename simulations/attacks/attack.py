"""What an attack is: what a hostile device does otherwise than an honest one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from lola_flwr.arrays import Float32Array, Float32Arrays
from lola_flwr.device.asked import Arrays, PartResult
from lola_flwr.model.backprop import Batch
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.randomness import rng_for
from lola_flwr.server.replies import DeviceReply
from lola_flwr.system.devices import DeviceProfile
from lola_flwr.wire.records import Assignment, PartTask
from simulations.attacks.task import AttackedTask

_Same = TypeVar("_Same")

# Names of runs without attack: with all devices, and without those that are hostile in
# the others.
HONEST, ABSENT = "none", "not there"
# The methods of training.
LOLA, D2FT = "lola", "d2ft"
BOTH = (LOLA, D2FT)


@dataclass(eq=False)
class Gang:
    """The hostile devices of a run, which tell each other all they know.

    Parameters
    ----------
    seed
        Of what they draw.
    partition
        The model's blocks.
    honest
        The gradients that members computed honestly, by parameter, latest last.
    kept
        Replies that members mean to use again, by device and block.
    norms
        Euclidean norms of the members' honest gradients, by block.
    values
        The model's values as they were sent last, by parameter, and those before.
    """

    seed: int
    partition: BlockPartition
    honest: dict[str, list[Float32Array]] = field(default_factory=dict)
    kept: dict[tuple[int, int], DeviceReply] = field(default_factory=dict)
    norms: dict[int, list[float]] = field(default_factory=dict)
    values: list[dict[str, Float32Array]] = field(default_factory=list)

    def saw(self, values: Mapping[str, Float32Array]) -> None:
        """Take note of what members were sent in a round."""
        copied = {name: array.copy() for name, array in values.items()}
        self.values = [*self.values[-1:], copied]

    def computed(self, block: int, gradients: Float32Arrays) -> None:
        """Take note of what a member computed."""
        for name, gradient in gradients.items():
            self.honest[name] = [*self.honest.get(name, ())[-9:], gradient]
        norm = norm_of(gradients)
        self.norms[block] = [*self.norms.get(block, ())[-9:], norm]


@dataclass(frozen=True, kw_only=True, eq=False)
class Turn:
    """A hostile device's turn to answer.

    Parameters
    ----------
    device
        Number of the device.
    times_asked
        How often it was asked before.
    assignment
        What it is asked for.
    gang
        What it shares with the others.
    """

    device: int
    times_asked: int
    assignment: Assignment
    gang: Gang

    @property
    def server_round(self) -> int:
        """Round, from 1."""
        return self.assignment.server_round

    def rng(self, *purpose: str | int) -> np.random.Generator:
        """Return the generator of what the device draws for a purpose."""
        return rng_for(self.gang.seed, "attack", *purpose)


@dataclass(frozen=True, kw_only=True, eq=False)
class PartTurn:
    """A device's turn to answer under D2FT.

    Parameters
    ----------
    device
        Id of the device.
    task
        What it is asked for.
    seed
        Of what it draws.
    """

    device: str
    task: PartTask
    seed: int

    def rng(self, *purpose: str | int) -> np.random.Generator:
        """Return the generator of what the device draws for a purpose."""
        task = self.task
        place = task.step, task.layer_index, task.branch_index
        return rng_for(self.seed, "attack", *purpose, self.device, *place)


def _as_it_is(honest: _Same, turn: object) -> _Same:
    return honest


@dataclass(frozen=True, kw_only=True, eq=False)
class Attack:
    """What a hostile device does otherwise than an honest one.

    Parameters
    ----------
    name
        By the terms of the field.
    gradients
        Makes of the gradients that it computed those that it sends.
    batch
        Makes of its mini-batch that on which it trains.
    reply
        Makes of its reply, with these gradients, what it sends.
    received
        Makes of what it is sent for its part of a step under D2FT what it goes by.
    part
        Makes of that part what it sends.
    profile
        Makes of its profile what it claims.
    joins_at_round
        First round in which it is there.
    methods
        Methods of training in which there is such an attack.
    """

    name: str
    gradients: Callable[[Float32Arrays, Turn], Float32Arrays] = _as_it_is
    batch: Callable[[Batch, AttackedTask], Batch] = _as_it_is
    reply: Callable[[DeviceReply, Turn], DeviceReply] = _as_it_is
    received: Callable[[Arrays, PartTurn], Arrays] = _as_it_is
    part: Callable[[PartResult, PartTurn], PartResult] = _as_it_is
    profile: Callable[[DeviceProfile], DeviceProfile] = lambda profile: profile
    joins_at_round: int = 1
    methods: Sequence[str] = (LOLA,)


def norm_of(gradients: Float32Arrays) -> float:
    """Return the Euclidean norm of all of them together."""
    return float(np.sqrt(sum(float((g * g).sum()) for g in gradients.values())))


def scaled(gradients: Float32Arrays, factor: float) -> Float32Arrays:
    """Return them times a number."""
    return {n: (g * factor).astype(np.float32) for n, g in gradients.items()}


def npy(array: npt.NDArray[Any]) -> bytes:
    """Return an array as it travels."""
    stream = BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()
