"""The schedule of each step of a training run, and how long a step takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from lola_flwr.d2ft.schedule import (
    FULL_TUNING,
    SOLVERS,
    Budgets,
    UnitCosts,
    operation_values,
    schedule_subnetworks,
)
from lola_flwr.d2ft.scores import Scores
from lola_flwr.errors import UserError
from lola_flwr.randomness import rng_for
from lola_flwr.system.channel import full_band_rate_bps, rayleigh_snr
from lola_flwr.system.devices import DeviceProfile

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


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
        Worth of a backward pass, in forward passes.
    solver
        A name from ``schedule.SOLVERS``.
    costs
        What operations cost.
    seed
        Seed of the run: between micro-batches chance decides. Their own scores would
        take a backward pass over each, which is what the schedule is to save.

    Raises
    ------
    UserError
        A field is out of range.
    """

    micro_batches: int = 5
    budgets: Budgets = field(default_factory=Budgets)
    same_micro_batches: bool = True
    shared_budgets: bool = False
    backward_weight: float = 3.0
    solver: str = "knapsack"
    costs: UnitCosts = FULL_TUNING
    seed: int = 0

    def __post_init__(self) -> None:
        if self.micro_batches < 1:
            raise UserError(f"micro_batches={self.micro_batches} must be at least 1.")
        if not self.backward_weight > 0:
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
        values = operation_values(
            Scores(fisher, magnitude, chance),
            owners,
            backward_weight=self.backward_weight,
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


@dataclass(frozen=True)
class StepCosts:
    """What a step costs by the cost model.

    Parameters
    ----------
    seconds
        How long it takes.
    sent_bytes
        What sub-networks send.
    """

    seconds: float
    sent_bytes: int


def step_costs(
    operations: IntArray,
    device_of: IntArray,
    profiles: Sequence[DeviceProfile],
    *,
    num_layers: int,
    hidden_size: int,
    tokens: npt.ArrayLike,
    forward_flops: npt.ArrayLike,
    bandwidth_hz: float,
    step: int,
    seed: int,
    costs: UnitCosts = FULL_TUNING,
) -> StepCosts:
    """Return what a step costs on a fleet whose devices share an uplink.

    Its time is that of the layers one after the other, each as long as its slowest
    device, and of the activations and gradients that are sent, each over the sender's
    whole band. Every sub-network sends its own, as in the paper, where it is the only
    one of its device: neighbours on one device would send less.

    Parameters
    ----------
    operations
        Operations, shape [S, M].
    device_of
        Device of each sub-network, shape [S].
    profiles
        The K devices.
    num_layers, hidden_size
        Layers L, and the width of what passes between them.
    tokens
        Tokens of each micro-batch, shape [M].
    forward_flops
        A forward pass of one sub-network over each micro-batch, FLOP, shape [M].
    bandwidth_hz, step, seed
        The channel: its band, and what its draw follows from.
    costs
        What operations cost.
    """
    compute = np.array(costs.compute)[operations] @ np.asarray(forward_flops)  # [S]
    messages = np.array(costs.traffic)[operations] @ np.asarray(tokens)  # [S]
    sent_bytes = 4.0 * hidden_size * messages
    speed = np.array([profile.flops_per_s for profile in profiles])
    seconds = compute / speed[device_of]
    compute_s = sum(
        float(np.bincount(owners, layer).max())
        for owners, layer in zip(
            device_of.reshape(num_layers, -1),
            seconds.reshape(num_layers, -1),
            strict=True,
        )
    )
    snr = rayleigh_snr(
        [profile.snr_db for profile in profiles],
        [profile.name for profile in profiles],
        server_round=step,
        seed=seed,
    )
    rate_bps = full_band_rate_bps(bandwidth_hz, snr)
    of_device = np.bincount(device_of, sent_bytes, minlength=len(profiles))
    upload_s = float((8 * of_device / rate_bps).sum())
    return StepCosts(compute_s + upload_s, int(sent_bytes.sum()))
