"""What is configured, as the library knows it: how the server steps, how rounds go."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lola_flwr.app.config import (
    AppConfig,
    LolaDeftConfig,
    UpdatesConfig,
)
from lola_flwr.arrays import Float32Arrays, IntArray
from lola_flwr.build import (
    AllocationOptions,
    DeviceOptions,
    NormLimits,
    RoundMode,
    RoundSettings,
    ServerStep,
    Transfer,
    coordinator_for,
)
from lola_flwr.costs.estimated import BlockCosts
from lola_flwr.costs.of_model import zeroth_order_costs
from lola_flwr.errors import UserError
from lola_flwr.model.activations import IN_PART
from lola_flwr.model.backprop import (
    Batch,
    BatchWeight,
    LossFunction,
    model_loss,
    num_examples_of,
)
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.model.example_gradients import example_gradients
from lola_flwr.model.loading import load_values
from lola_flwr.model.stored_base import stored_values
from lola_flwr.randomness import rng_for
from lola_flwr.run.config import keyword_arguments
from lola_flwr.server.coordinator import Coordinator
from lola_flwr.server.own_examples import ExampleGradients
from lola_flwr.server.selection import NEEDS_RESPONSE, Selection, selector_named
from lola_flwr.server.selection.importance import Response
from lola_flwr.wire.low_rank import LowRankProjection
from lola_flwr.zeroth_order.forward_costs import forward_mode_costs
from lola_flwr.zeroth_order.mixing import ZerothOrder

# That tell enough; a quarter of them tell less than half as much.
_OWN_EXAMPLES = 64


def make_coordinator(
    config: UpdatesConfig,
    model: Any,
    partition: BlockPartition,
    *,
    costs: BlockCosts,
    example_weight: int = 1,
    response: Response | None = None,
    own_examples: ExampleGradients | None = None,
) -> Coordinator:
    """Put the coordinator together for a model and a run configuration.

    Parameters
    ----------
    config
        Run configuration.
    model, partition
        The model to start from, and its blocks.
    costs
        What each block costs a device.
    example_weight
        What an example of a mini-batch weighs at most.
    response
        What measures how important blocks are, if anything needs it.
    own_examples
        Gives the gradients of the server's own examples, if it has any.
    """
    settings = settings_of(config, model, partition, response)
    devices = replace(settings.devices, own_examples=own_examples)
    return coordinator_for(
        model,
        partition,
        costs=costs,
        batch_size=config.largest_batch,
        step=server_step_of(config),
        settings=replace(settings, devices=devices, example_weight=example_weight),
    )


def server_step_of(config: AppConfig) -> ServerStep:
    """Return how the server steps."""
    is_named = config.schedule not in ("constant", "linear")
    return ServerStep(
        optimizer=config.optimizer,
        lr=config.lr,
        options=keyword_arguments(config.optimizer_options),
        linear_decay_steps=config.rounds if config.schedule == "linear" else None,
        schedule=config.schedule if is_named else None,
        schedule_options=keyword_arguments(config.schedule_options),
        block_mean=config.block_mean if isinstance(config, UpdatesConfig) else "mean",
    )


def limits_of(config: AppConfig) -> NormLimits:
    """Return how long gradients may be."""
    return NormLimits(config.max_gradient_norm, config.norm_factor or math.inf)


def settings_of(
    config: UpdatesConfig,
    model: Any,
    partition: BlockPartition,
    response: Response | None = None,
) -> RoundSettings:
    """Return how the run's rounds go; where blocks differ, by what a response tells."""
    settings = RoundSettings(
        channel=config.shared_channel(config.bandwidth_hz),
        transfer=Transfer(
            codec=config.codec,
            head=config.head,
            low_rank=low_rank_of(config),
            downlink=config.downlink,
            downlink_codec=config.downlink_codec,
        ),
        allocation=AllocationOptions(
            allocator=config.allocator,
            # The one block of full fine-tuning: every device trains it.
            mode=RoundMode(participation="all"),
            codec_slack=config.codec_slack,
            energy_slack=config.energy_slack,
            longest_round_s=config.longest_round_s,
            batch_sizes=config.batch_sizes,
            influence_factor=config.influence_factor or math.inf,
        ),
        devices=DeviceOptions(
            correct_profiles=config.correct_profiles, reputation=config.reputation
        ),
        limits=limits_of(config),
        seed=config.seed,
    )
    if not isinstance(config, LolaDeftConfig):
        return settings
    if config.reduced_schedules and config.activations != "exact":
        raise UserError(IN_PART)
    mode = RoundMode(
        devices_per_block=config.devices_per_block,
        participation=config.participation,
        backups=config.backups,
    )
    return replace(
        settings,
        transfer=replace(settings.transfer, rank=config.rank or None),
        allocation=replace(
            settings.allocation,
            mode=mode,
            rotation_eps=config.rotation_eps,
            sharing_eps=config.sharing_eps,
            further_blocks=config.further_blocks,
        ),
        selection=selection_of(config, model, partition, response),
        devices=replace(
            settings.devices,
            zeroth_order=zeroth_order_of(config, model, partition),
            reduced_schedules=config.reduced_schedules,
        ),
    )


def selection_of(
    config: LolaDeftConfig,
    model: Any,
    partition: BlockPartition,
    response: Response | None = None,
) -> Selection:
    """Return how the run chooses each round's blocks, by what a response tells."""
    selector = selector_named(
        config.selector,
        keyword_arguments(config.selector_options),
        partition=partition,
        weight_of=lambda name: stored_values(model, name).numpy(force=True),
    )
    return Selection(
        selector,
        latency_target_s=config.latency_target_s or math.inf,
        value=config.block_value,
        response=response,
    )


def response_of(
    config: LolaDeftConfig,
    model: Any,
    partition: BlockPartition,
    num_examples: int,
    mean_loss: Callable[[IntArray], float],
) -> Response | None:
    """Return what measures the loss on the server's own examples, if anything needs it.

    Parameters
    ----------
    config
        Run configuration.
    model, partition
        The server's model; its values are overwritten at every call.
    num_examples
        Training examples; the server holds some of them.
    mean_loss
        Gives the model's loss on the examples of these numbers.
    """
    if config.selector != NEEDS_RESPONSE:
        return None
    drawn = _drawn(config.seed, "proxy", config.proxy_examples, num_examples)

    def response(values: Float32Arrays) -> float:
        load_values(
            model, partition.trainable, [values[n] for n in partition.trainable]
        )
        return mean_loss(drawn)

    return response


def num_own_examples(config: UpdatesConfig) -> int:
    """Return by how many examples the server judges devices, where it can by any."""
    if not isinstance(config.own_examples, str):
        return config.own_examples
    # Projected gradients are not compared with those of examples.
    return _OWN_EXAMPLES if config.reputation and not config.low_rank else 0


def own_examples_of(
    config: UpdatesConfig,
    model: Any,
    partition: BlockPartition,
    num_examples: int,
    batch_of: Callable[[IntArray], Batch],
    *,
    loss_function: LossFunction = model_loss,
    batch_weight: BatchWeight = num_examples_of,
) -> ExampleGradients | None:
    """Return what gives the gradients of the server's own examples, if it has any.

    Parameters
    ----------
    config
        Run configuration.
    model, partition
        The server's model; its values are overwritten at every call.
    num_examples
        Training examples; the server holds some of them.
    batch_of
        Gives a batch of the training examples of some numbers.
    loss_function, batch_weight
        As devices have them.
    """
    count = num_own_examples(config)
    if not count:
        return None
    drawn = _drawn(config.seed, "own examples", count, num_examples)
    return example_gradients(
        model,
        partition,
        lambda chosen: batch_of(drawn[chosen]),
        len(drawn),
        loss_function=loss_function,
        batch_weight=batch_weight,
    )


def _drawn(seed: int, purpose: str, wanted: int, num_examples: int) -> IntArray:
    """Draw those of the training examples that the server holds."""
    count = min(wanted, num_examples)
    return rng_for(seed, purpose).choice(num_examples, count, replace=False)


def zeroth_order_of(
    config: LolaDeftConfig, model: Any, partition: BlockPartition
) -> ZerothOrder | None:
    """Return how the run uses devices that do not back-propagate."""
    if config.zeroth_order == "off":
        return None
    options = keyword_arguments(config.zeroth_order_options)
    num_directions = options.get("num_directions", ZerothOrder.num_directions)
    count = zeroth_order_costs
    if options.get("perturbation") == 0:
        count = forward_mode_costs
    costs = count(
        model,
        partition,
        batch_size=config.largest_batch,
        sequence_length=config.max_length,
        num_directions=num_directions,
    )
    try:
        return ZerothOrder(costs=costs, use=config.zeroth_order, **options)
    except TypeError as error:
        raise UserError(f"zeroth-order-options: {error}.") from None


def low_rank_of(config: UpdatesConfig) -> LowRankProjection | None:
    """Return how the run projects gradients, if it does."""
    if not config.low_rank:
        return None
    try:
        return LowRankProjection(**keyword_arguments(config.low_rank), seed=config.seed)
    except TypeError as error:
        raise UserError(f"low-rank={config.low_rank!r}: {error}.") from None
