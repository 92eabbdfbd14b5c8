"""Build the server's side around a model: a coordinator, or D2FT's trainer.

What they are told is here, too, so that one import has it all.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lola_flwr.allocation import RoundMode
from lola_flwr.costs.estimated import BlockCosts
from lola_flwr.costs.of_model import model_costs
from lola_flwr.d2ft.find import find_subnetworks
from lola_flwr.d2ft.steps import StepSchedules
from lola_flwr.device.part import stand_in
from lola_flwr.errors import UserError
from lola_flwr.model.adapter_blocks import model_partition
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.model.exchange import Exchange, with_the_rest
from lola_flwr.model.found import found_blocks
from lola_flwr.model.loading import digest_of, fingerprint
from lola_flwr.model.plain_input import is_plain
from lola_flwr.model.stacks import sample_of
from lola_flwr.model.stored_base import in_full
from lola_flwr.model.trace import Example
from lola_flwr.optimizer import ServerOptimizer
from lola_flwr.planning import AllocationOptions
from lola_flwr.server.coordinator import Coordinator
from lola_flwr.server.low_rank_optimizer import LowRankOptimizer
from lola_flwr.server.model import ServedModel
from lola_flwr.server.norm_limits import NormLimits
from lola_flwr.server.selection import Selection
from lola_flwr.server.settings import DeviceOptions, RoundSettings, Transfer
from lola_flwr.server.spread.plan import MicroBatches
from lola_flwr.server.spread.trainer import SpreadTrainer
from lola_flwr.server.step import ServerStep
from lola_flwr.system.channel import Channel, DownlinkChannel
from lola_flwr.system.devices import DeviceProfile

__all__ = [
    "AllocationOptions",
    "Channel",
    "DeviceOptions",
    "DownlinkChannel",
    "MicroBatches",
    "NormLimits",
    "RoundMode",
    "RoundSettings",
    "Selection",
    "ServerStep",
    "Transfer",
    "check_first_round",
    "coordinator_for",
    "coordinator_for_weights",
    "model_costs",
    "trainer_for",
]

_logger = logging.getLogger(__name__)

# A damped move towards the weights that devices return.
_TO_WEIGHTS = ServerStep(optimizer="SGD", lr=1.0)


def coordinator_for(
    model: nn.Module,
    partition: BlockPartition,
    *,
    costs: BlockCosts,
    batch_size: int = 32,
    step: ServerStep | None = None,
    settings: RoundSettings | None = None,
    state_dict: Mapping[str, npt.NDArray[Any]] | None = None,
) -> Coordinator:
    """Put a coordinator together that fine-tunes a model from its present values.

    Parameters
    ----------
    model
        The model; its values are copied.
    partition
        Its blocks.
    costs
        What each block costs a device.
    batch_size
        Examples of a device's mini-batch.
    step
        How the server steps. Where gradients are projected (``transfer.low_rank``) it
        steps in the projected space.
    settings
        How the rounds go.
    state_dict
        All arrays of the model in the order to send them in, where devices do not hold
        the frozen ones themselves (default: the trainable ones alone are sent).

    Raises
    ------
    LayerNotUnderstood
        ``reduced_schedules`` of a model whose layers cannot run in part.
    UserError
        ``transfer.rank`` with a mean that is not linear.
    """
    step = ServerStep() if step is None else step
    settings = RoundSettings() if settings is None else settings
    if settings.devices.reduced_schedules:
        find_subnetworks(model, partition, num_groups=1)
    values = _trainable_values(model, partition)
    low_rank = settings.transfer.low_rank
    settings.check_step(step)
    devices = settings.devices
    if devices.reputation and devices.own_examples is None and low_rank is None:
        _logger.info(
            "devices are judged by each other's gradients alone; examples of the "
            "server's own tell hostile ones sooner: DeviceOptions(own_examples="
            "example_gradients(...)), of lola_flwr.model.example_gradients"
        )
    served = ServedModel(
        partition,
        ServerOptimizer(values, **step.arguments())
        if low_rank is None
        else LowRankOptimizer(values, low_rank, **step.arguments()),
        base_fingerprint=fingerprint(model, partition.frozen),
        state_dict=state_dict,
        block_mean=step.block_mean,
        steady=step.steady,
    )
    return Coordinator(served, costs, batch_size=batch_size, settings=settings)


def check_first_round(
    coordinator: Coordinator, profiles: Sequence[DeviceProfile]
) -> None:
    """Plan a first round, which devices that cannot train the model do not have.

    So an app's own check (``check`` of ``[tool.lola-flwr]``) says before anything has
    started what the run would say after all devices were asked.

    Parameters
    ----------
    coordinator
        The run's, made for this.
    profiles
        What each device offers.

    Raises
    ------
    UserError
        There are too few devices, or none that can train some block.
    """
    devices = [str(index) for index in range(len(profiles))]
    coordinator.meet_devices(1, devices)
    for device, profile in zip(devices, profiles, strict=True):
        coordinator.add_device(device, profile.to_properties())
    coordinator.plan_round(1, devices)


def trainer_for(
    model: nn.Module,
    partition: BlockPartition,
    *,
    schedules: StepSchedules,
    num_groups: int | None = None,
    micro_batches: MicroBatches | None = None,
    step: ServerStep | None = None,
    channel: Channel | None = None,
    limits: NormLimits | None = None,
    seed: int = 0,
) -> SpreadTrainer:
    """Put a trainer together that fine-tunes a model spread over devices (D2FT).

    Parameters
    ----------
    model
        The model; its values are copied, and overwritten in every step.
    partition
        Its blocks.
    step
        How the server steps.
    schedules, num_groups, micro_batches, channel, limits, seed
        As in `SpreadTrainer`.

    Raises
    ------
    LayerNotUnderstood
        The model's layers cannot be cut into sub-networks.
    UserError
        ``step.block_mean``, ``step.steady``: devices do not have updates of their own
        here.
    """
    step = ServerStep() if step is None else step
    if step.block_mean != "mean":
        raise UserError(
            f"block_mean={step.block_mean!r}: with D2FT no device has an update of its "
            "own to put together with others'; leave it at 'mean'."
        )
    if step.steady:
        raise UserError("steady=True: with D2FT no device has an update of its own.")
    return SpreadTrainer(
        model,
        partition,
        optimizer=ServerOptimizer(
            _trainable_values(model, partition), **step.arguments()
        ),
        schedules=schedules,
        num_groups=num_groups,
        micro_batches=micro_batches,
        channel=channel,
        limits=limits,
        seed=seed,
        recompute=stand_in(model, partition),
    )


def coordinator_for_weights(
    model: nn.Module,
    *,
    batch_size: int = 32,
    sequence_length: int = 1,
    stack: str | None = None,
    blocks: str | Sequence[str] | None = None,
    example: Example | None = None,
    exchanged: Iterable[str] | Mapping[str, npt.NDArray[Any]] | None = None,
    step: ServerStep = _TO_WEIGHTS,
    settings: RoundSettings | None = None,
) -> Coordinator:
    """Make the coordinator of a project whose devices train the model themselves.

    Devices are sent what the project exchanges and return weights. The server's step is
    then a damped move towards them, which is what SGD with a rate of 1 does. What the
    project has frozen (``requires_grad=False``) stays so; where only the head is left,
    it is the one block. Blocks are the layers of a model of transformers, and in any
    other what ``found_blocks`` finds: there all else that wants a gradient is trained.
    What is trained and not exchanged is each device's own.

    Parameters
    ----------
    model
        The model, with the values to start from.
    batch_size
        Examples of a device's mini-batch.
    sequence_length
        Tokens of an example; 1 where examples are no sequences.
    stack, blocks
        Where the blocks are not the layers of the longest stack: as for
        ``partition_parameters``.
    example
        The model's input for some examples (``torch.zeros(1, 3, 224, 224)``), on which
        costs are counted, and which shows what runs before and behind the blocks.
        Needed where it does not follow from the model; what to pass is then said.
    exchanged
        Names of the arrays that devices are sent, in that order, or the arrays that
        they start from by name (default: the state dict). Names are those of the state
        dict, of the state dict of a module in it, or those that peft saves adapters
        under. What is not exchanged may be of types that NumPy lacks.
    step
        How the server steps.
    settings
        How the rounds go.

    Raises
    ------
    UserError
        A model of transformers does not show one stack of equal layers, what blocks
        cost cannot be counted, trained parameters go by two names, or arrays are not
        the model's or have a type that NumPy lacks.
    """
    exchange = Exchange.of(model, exchanged)
    if stack is None and blocks is None and is_plain(model):
        partition, example = found_blocks(
            model, example, sequence_length=sequence_length
        )
    else:
        partition = model_partition(model, stack=stack, blocks=blocks, example=example)
    settings = RoundSettings() if settings is None else settings
    if settings.devices.train_all and blocks is None:
        partition = with_the_rest(model, partition, exchange)
    partition = _exchanged_part(model, partition, exchange)
    given = exchanged if isinstance(exchanged, Mapping) else None
    state = _state(model, exchange, given)
    costs = model_costs(
        model,
        partition,
        batch_size=batch_size,
        sequence_length=sequence_length,
        example=example,
    )
    wire = replace(
        partition,
        blocks=tuple(exchange.wire(block) for block in partition.blocks),
        head=exchange.wire(partition.head),
    )
    frozen = zip(partition.frozen, exchange.wire(partition.frozen), strict=True)
    served = ServedModel(
        wire,
        ServerOptimizer(
            {name: state[name] for name in wire.trainable}, **step.arguments()
        ),
        base_fingerprint=digest_of(
            (n, in_full(torch.from_numpy(state[s]))) for n, s in frozen
        ),
        state_dict=state,
        block_mean=step.block_mean,
        steady=step.steady,
        exchange=exchange,
    )
    return Coordinator(served, costs, batch_size=batch_size, settings=settings)


def _exchanged_part(
    model: nn.Module, partition: BlockPartition, exchange: Exchange
) -> BlockPartition:
    """Return the partition of what is exchanged; say what is trained no more."""
    exchanged = set(exchange.own.values())
    kept_back = {name for name in partition.trainable if name not in exchanged}
    if kept_back == {*partition.trainable}:
        raise UserError(
            f"Nothing of what is trained ({sample_of(partition.trainable)}) is "
            f"exchanged ({sample_of([*exchange.own])}): let what is to be trained want "
            "gradients, and exchange it."
        )
    partition = partition.freezing(kept_back)
    parameters = dict(model.named_parameters())
    trained = {id(parameters[name]): name for name in partition.trainable}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if trained.get(id(parameter), name) != name and name in exchanged:
            raise UserError(
                f"{name} and {trained[id(parameter)]} are one parameter, which "
                "would be trained under one name and sent under both; untie them."
            )
    left = [
        name
        for name in partition.frozen
        if name in exchanged and name in parameters and parameters[name].requires_grad
    ]
    if left:
        _logger.warning(
            "%d parameters stand before or beside the blocks and keep their values, "
            "though they want gradients: %s",
            len(left),
            sample_of(left),
        )
    frozen = tuple(name for name in partition.frozen if name in exchanged)
    return replace(partition, frozen=frozen)


def _state(
    model: nn.Module,
    exchange: Exchange,
    given: Mapping[str, npt.NDArray[Any]] | None,
) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays that are exchanged: the model's, or those to start from."""
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    if given is None:
        return {n: _array(n, tensors[own]).copy() for n, own in exchange.own.items()}
    for name, own in exchange.own.items():
        if given[name].shape != tuple(tensors[own].shape):
            raise UserError(
                f"Initial arrays: {name} has shape {given[name].shape}; expected "
                f"{tuple(tensors[own].shape)}."
            )
    return {name: np.array(array) for name, array in given.items()}


def _trainable_values(
    model: nn.Module, partition: BlockPartition
) -> dict[str, npt.NDArray[Any]]:
    parameters = dict(model.named_parameters())
    for name in partition.trainable:
        if not parameters[name].requires_grad:
            raise UserError(
                f"{name} is frozen (requires_grad=False), but part of the blocks or "
                "the head: make them with model_partition(model), which leaves it out, "
                "or let it want gradients."
            )
    return {name: _array(name, parameters[name]) for name in partition.trainable}


def _array(name: str, tensor: Tensor) -> npt.NDArray[Any]:
    """Return a tensor as an array, which cannot hold all of PyTorch's types."""
    try:
        return np.asarray(tensor.numpy(force=True))
    except TypeError:
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise UserError(
            f"{name} is of type {dtype}, which NumPy and Flower's arrays lack: use "
            "model.float() on server and devices."
        ) from None
