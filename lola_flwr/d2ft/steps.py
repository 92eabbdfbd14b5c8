"""The schedule of each step of a training run, and how long a step takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from lola_flwr.arrays import Float64Array, IntArray
from lola_flwr.d2ft.schedule import (
    FULL_TUNING,
    SOLVERS,
    Budgets,
    Scores,
    UnitCosts,
    operation_values,
    schedule_subnetworks,
)
from lola_flwr.errors import UserError
from lola_flwr.randomness import rng_for
from lola_flwr.system.channel import Channel, rates_up_bps
from lola_flwr.system.devices import DeviceProfile
from lola_flwr.system.own_channel import Moment


@dataclass(frozen=True, kw_only=True)
class StepSchedules:
    """Gives each step its schedule.

    Parameters
    ----------
    micro_batches
        Micro-batches of a step M.
    budgets
        What a step may cost.
    same_micro_batches
        Whether all sub-networks are to run the same micro-batches.
    shared_budgets
        Whether the sub-networks of a device share its budget, and compete by their
        scores; otherwise each has its own, as in the paper, where a device holds one.
    backward_weight
        Worth of a backward pass, in forward passes (default: half as much again as it
        costs; what is worth no more than it costs is often left out, which teaches a
        model little).
    solver
        A name from ``schedule.SOLVERS``.
    costs
        What operations cost.
    seed
        Seed of the run: between micro-batches chance decides. Their own scores would
        take a backward pass over each, which is what the schedule is to save.
    return_every
        Steps after which devices of a model that is spread over them return what they
        hold, for the case that they fail.
    audit_share
        Part of the steps, 0 to 1, in which the server computes again what a device that
        is drawn by lot has computed of one branch. Unless it is 0, gradients of losses
        are compared in all steps with those that labels have.
    audit_seed
        Seed of those draws, where a run is to be repeated to the byte; who knows it
        knows when to be honest (default: drawn anew by each trainer).

    Raises
    ------
    UserError
        A field is out of range.
    """

    micro_batches: int = 5
    budgets: Budgets = field(default_factory=Budgets)
    same_micro_batches: bool = True
    shared_budgets: bool = False
    backward_weight: float | None = None
    solver: str = "knapsack"
    costs: UnitCosts = FULL_TUNING
    seed: int = 0
    return_every: int = 100
    audit_share: float = 0.5
    audit_seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("micro_batches", "return_every"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise UserError(f"{name}={value!r} must be a whole number, at least 1.")
        for name in ("same_micro_batches", "shared_budgets"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(
                    f"{name}={getattr(self, name)!r} must be true or false."
                )
        if not 0 <= self.audit_share <= 1:
            raise UserError(f"audit_share={self.audit_share!r} must be from 0 to 1.")
        seed = self.audit_seed
        if seed is not None and (type(seed) is not int or seed < 0):
            raise UserError(f"audit_seed={seed!r} must be a whole number, at least 0.")
        if self.backward_weight is not None and not self.backward_weight > 0:
            raise UserError(f"backward_weight={self.backward_weight} must be positive.")
        if self.solver not in SOLVERS:
            raise UserError(
                f"solver={self.solver!r} is unknown; choose from {', '.join(SOLVERS)}."
            )

    def operations(
        self, step: int, device_of: IntArray, scores: Scores | None = None
    ) -> IntArray:
        """Return what each sub-network does in each micro-batch, shape [S, M].

        Parameters
        ----------
        step
            Step, from 1.
        device_of
            Device of each sub-network, shape [S].
        scores
            Scores of the sub-networks, for ``shared_budgets`` (default: all alike).
            Otherwise there is nothing to decide between, and they are not looked at.

        Raises
        ------
        UserError
            The budgets let no sub-network run.
        """
        shape = (device_of.size, self.micro_batches)
        rows = 1 if self.same_micro_batches else shape[0]
        chance = rng_for(self.seed, "ties", step).random((rows, shape[1]))
        chance = np.broadcast_to(chance, shape)
        owners = device_of if self.shared_budgets else np.arange(device_of.size)
        fisher, magnitude = np.ones(shape), np.ones(device_of.size)
        if scores is not None and self.shared_budgets:
            fisher = np.broadcast_to(scores.fisher, shape)
            magnitude = scores.magnitude
        weight = self.backward_weight
        if weight is None:
            _, forward, full = self.costs.compute
            weight = 1.5 * (full - forward)
        values = operation_values(
            Scores(fisher, magnitude, chance), owners, backward_weight=weight
        )
        operations = schedule_subnetworks(
            values, owners, self.budgets, costs=self.costs, solver=self.solver
        )
        if not operations.any():
            raise UserError(
                f"compute={self.budgets.compute}, traffic={self.budgets.traffic} let "
                "no sub-network run; raise the budgets."
            )
        return operations


def compute_s(
    operations: IntArray,
    device_of: IntArray,
    flops_per_s: npt.ArrayLike,
    *,
    num_layers: int,
    forward_flops: npt.ArrayLike,
    costs: UnitCosts = FULL_TUNING,
) -> float:
    """Return how long a step computes: layer by layer, each as its slowest device.

    Parameters
    ----------
    operations
        Operations, shape [S, M].
    device_of
        Device of each sub-network, shape [S].
    flops_per_s
        Speed of each device, shape [K].
    num_layers
        Layers L.
    forward_flops
        A forward pass of one sub-network over each micro-batch, FLOP, shape [M].
    costs
        What operations cost.
    """
    flops = np.array(costs.compute)[operations] @ np.asarray(forward_flops)  # [S]
    seconds = flops / np.asarray(flops_per_s)[device_of]
    return sum(
        float(np.bincount(owners, layer).max())
        for owners, layer in zip(
            device_of.reshape(num_layers, -1),
            seconds.reshape(num_layers, -1),
            strict=True,
        )
    )


def activation_bytes(
    operations: IntArray,
    tokens: npt.ArrayLike,
    hidden_size: int,
    *,
    costs: UnitCosts = FULL_TUNING,
) -> Float64Array:
    """Return what each sub-network sends in a step, bytes, shape [S].

    Each sends its own activations and gradients of such, in float32, as in the paper,
    where it is the only one of its device: neighbours on one device may send less.

    Parameters
    ----------
    operations
        Operations, shape [S, M].
    tokens
        Tokens of each micro-batch, shape [M].
    hidden_size
        Width of what passes between layers.
    costs
        What operations cost.
    """
    messages = np.array(costs.traffic)[operations] @ np.asarray(tokens)
    return np.asarray(4.0 * hidden_size * messages)


def uploads_s(
    sent_bytes: npt.ArrayLike,
    profiles: Sequence[DeviceProfile],
    *,
    channel: Channel,
    moment: Moment,
) -> float:
    """Return how long it takes until all devices have sent, each with the whole band.

    Parameters
    ----------
    sent_bytes
        What each device sends, shape [K].
    profiles
        The K devices.
    channel
        What they share.
    moment
        When the step begins.
    """
    rate_bps = rates_up_bps(profiles, channel, moment)
    return float((8 * np.asarray(sent_bytes) / rate_bps).sum())
