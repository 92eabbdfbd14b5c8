"""A device with its part of an app's training data; it needs no Flower."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from torch import nn

from lola_flwr.app.config import AppConfig, LolaDeftConfig, UpdatesConfig
from lola_flwr.app.methods import zeroth_order_of
from lola_flwr.app.profiles import configured, simulated_profile
from lola_flwr.clients.node import node_partition, node_profile, states_profile
from lola_flwr.costs.estimated import BlockCosts
from lola_flwr.d2ft.operations import from_text
from lola_flwr.d2ft.reduced import reduced_costs
from lola_flwr.deployment.app_code import DeviceContext
from lola_flwr.device.block_device import BlockDevice
from lola_flwr.device.store import run_store
from lola_flwr.model.backprop import Batch, BatchWeight, num_examples_of
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.randomness import rng_for
from lola_flwr.system.devices import DeviceProfile
from lola_flwr.wire.records import Assignment
from lola_flwr.zeroth_order.mixing import ZerothOrder


@dataclass(frozen=True, eq=False)
class KnownCosts:
    """What a device knows of its model's costs.

    Parameters
    ----------
    of_blocks
        What training each block costs.
    zeroth_order
        What it costs by forward passes alone; None where no device trains so.
    """

    of_blocks: BlockCosts
    zeroth_order: ZerothOrder | None = None

    @classmethod
    def of(
        cls,
        config: UpdatesConfig,
        model: nn.Module,
        partition: BlockPartition,
        of_blocks: BlockCosts,
    ) -> KnownCosts:
        """Return what a run's configuration asks to be known."""
        if not isinstance(config, LolaDeftConfig):
            return cls(of_blocks)
        return cls(of_blocks, zeroth_order_of(config, model, partition))

    def count(self, config: UpdatesConfig) -> None:
        """Count now what would else be counted in a device's first round.

        Rounds that choose batches ask for several blocks.
        """
        if config.batch_sizes and self.of_blocks.together is not None:
            self.of_blocks.together()


@dataclass(frozen=True, kw_only=True, eq=False)
class DeviceParts:
    """What an app gives its devices.

    Parameters
    ----------
    load_model
        Gives the model and its blocks; the devices of a process share it.
    draw
        Draws a mini-batch: ``(index, num_partitions, rng, batch_size)``, where the
        first two say which part of the data is the device's.
    costs
        Gives what the blocks cost; asked where devices train them by themselves.
    batch_weight
        What a mini-batch's mean loss weighs.
    num_examples
        Gives how many examples a device has: ``(index, num_partitions)``.
    """

    load_model: Callable[[], tuple[nn.Module, BlockPartition]]
    draw: Callable[[int, int, np.random.Generator, int], Batch]
    costs: Callable[[], KnownCosts]
    batch_weight: BatchWeight = num_examples_of
    num_examples: Callable[[int, int], int] | None = None


def make_device(
    context: DeviceContext, config: AppConfig, parts: DeviceParts
) -> BlockDevice:
    """Make one device: a simulated one, unless the node states a profile of its own."""
    index, num_partitions = node_partition(context)
    measured = states_profile(context.node_config)
    profile = node_profile(context) if measured else simulated_profile(config, index)
    profile = configured(profile, config, index)
    if parts.num_examples is not None and config.batch_sizes:
        held = parts.num_examples(index, num_partitions)
        profile = replace(profile, num_examples=held)

    def draw_batch(server_round: int, batch_size: int) -> Batch:
        rng = rng_for(config.seed, "batch", server_round, profile.name)
        return parts.draw(index, num_partitions, rng, batch_size)

    device = BlockDevice(
        profile=profile,
        load_model=parts.load_model,
        batch_source=draw_batch,
        batch_weight=parts.batch_weight,
        store=run_store(context.run_id),
        accelerator=config.accelerator,
        precision=config.precision,
        seed=config.seed,
    )
    if not isinstance(config, UpdatesConfig):
        return device
    return replace(
        device,
        micro_batch_size=config.micro_batch_size,
        activations=config.activations,
        costs=lambda: parts.costs().of_blocks,
        simulated_compute_s=(
            None
            if measured
            else partial(_simulated_compute_s, config, profile, parts.costs)
        ),
        sequence_length=config.max_length,
    )


def lognormal(sigma: float, rng: np.random.Generator) -> float:
    """Draw a factor around 1 whose logarithm has the standard deviation sigma."""
    return float(np.exp(sigma * rng.standard_normal()))


def _simulated_compute_s(
    config: UpdatesConfig,
    profile: DeviceProfile,
    costs: Callable[[], KnownCosts],
    assignment: Assignment,
) -> float:
    error = rng_for(config.seed, "profile error", profile.name)
    jitter = rng_for(config.seed, "jitter", assignment.server_round, profile.name)
    known = costs()
    of_blocks = known.of_blocks
    if assignment.direction_seed is not None and known.zeroth_order is not None:
        of_blocks = known.zeroth_order.costs
    if config.batch_sizes:
        of_blocks = of_blocks.at(assignment.batch_size)
    # Back-propagation passes all from the deepest, which a window may not begin with.
    deepest, *_ = blocks = sorted(assignment.blocks)
    of_blocks = of_blocks.joined([blocks])
    flops = float(of_blocks.required_flops([profile])[0, deepest])
    if assignment.operations is not None:
        operations = from_text(assignment.operations)
        flops, _ = reduced_costs(of_blocks, deepest, operations)
    return float(
        flops
        / profile.flops_per_s
        * lognormal(config.profile_error, error)
        * lognormal(config.compute_jitter, jitter)
    )
