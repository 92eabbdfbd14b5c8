"""Build a coordinator around a model: its costs, its optimizer, its fingerprint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lola_flwr.blocks import BlockPartition, partition_parameters
from lola_flwr.codec import NPY_HEADER_BYTES, codec_named
from lola_flwr.coordinator import Coordinator
from lola_flwr.errors import UserError
from lola_flwr.models import fingerprint
from lola_flwr.server_optimizer import ServerOptimizer
from lola_flwr.system.costs import BlockCosts, estimate_costs


def model_costs(
    model: nn.Module,
    partition: BlockPartition,
    *,
    batch_size: int,
    sequence_length: int,
    codec: str = "fp32",
    merged: bool = False,
    micro_batch_size: int = 0,
) -> BlockCosts:
    """Estimate each block's costs under a codec, as ``estimate_costs`` does.

    Parameters
    ----------
    model
        The model.
    partition
        Its layers as blocks, also if ``merged``.
    batch_size, sequence_length, merged, micro_batch_size
        As for ``estimate_costs``.
    codec
        Name of the codec that gradients travel in.
    """
    return estimate_costs(
        {name: tuple(values.shape) for name, values in model.named_parameters()},
        partition,
        batch_size=batch_size,
        sequence_length=sequence_length,
        bits_per_element=codec_named(codec).bits_per_element,
        header_bits_per_tensor=8 * NPY_HEADER_BYTES,
        dropout_heads=_dropout_heads(model),
        merged=merged,
        micro_batch_size=micro_batch_size,
    )


def coordinator_for(
    model: nn.Module,
    partition: BlockPartition,
    *,
    optimizer: str = "AdamW",
    lr: float = 3e-4,
    optimizer_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Coordinator:
    """Put a coordinator together that fine-tunes a model from its present values.

    Parameters
    ----------
    model
        The model; its values are copied.
    partition
        Its blocks.
    optimizer, lr, optimizer_options
        Name and keyword arguments of the server's optimizer and of its schedule, as for
        ``ServerOptimizer``.
    **options
        Further arguments of ``Coordinator``: ``costs`` and ``bandwidth_hz`` at least.
    """
    parameters = dict(model.named_parameters())
    return Coordinator(
        partition=partition,
        optimizer=ServerOptimizer(
            {name: parameters[name].numpy(force=True) for name in partition.trainable},
            optimizer=optimizer,
            lr=lr,
            **(optimizer_options or {}),
        ),
        base_fingerprint=fingerprint(model, partition.frozen),
        **options,
    )


def coordinator_for_weights(
    model: nn.Module,
    *,
    batch_size: int,
    sequence_length: int = 1,
    stack: str | None = None,
    bandwidth_hz: float = 20e6,
    optimizer: str = "SGD",
    lr: float = 1.0,
    optimizer_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Coordinator:
    """Make the coordinator of a project whose devices train the model themselves.

    Devices are sent the whole state dict and return weights. The server's step is
    then a damped move towards them, which is what SGD with a rate of 1 does.

    Parameters
    ----------
    model
        The model, with the values to start from.
    batch_size
        Examples of a device's mini-batch.
    sequence_length
        Tokens of an example; 1 where examples are no sequences.
    stack
        Prefix of the stack of layers (default: the longest one).
    bandwidth_hz
        Total uplink bandwidth.
    optimizer, lr, optimizer_options
        Name and keyword arguments of the server's optimizer and of its schedule, as
        for ``ServerOptimizer``.
    **options
        Further arguments of ``Coordinator``.

    Raises
    ------
    UserError
        The model does not show one stack of equal layers, or trained parameters go
        by two names.
    """
    parameters = dict(model.named_parameters())
    partition = partition_parameters(parameters, stack=stack)
    trained = {id(parameters[name]): name for name in partition.trainable}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if trained.get(id(parameter), name) != name:
            raise UserError(
                f"{name} and {trained[id(parameter)]} are one parameter, which "
                "would be trained under one name and sent under both; untie them."
            )
    state = {
        name: tensor.numpy(force=True).copy()
        for name, tensor in model.state_dict().items()
    }
    return coordinator_for(
        model,
        partition,
        costs=model_costs(
            model,
            partition,
            batch_size=batch_size,
            sequence_length=sequence_length,
        ),
        bandwidth_hz=bandwidth_hz,
        optimizer=optimizer,
        lr=lr,
        optimizer_options=optimizer_options,
        batch_size=batch_size,
        state_dict=state,
        **options,
    )


def _dropout_heads(model: nn.Module) -> int:
    """Return the attention heads if training drops attention weights out, else 0."""
    config = getattr(model, "config", None)
    drops = getattr(config, "attention_probs_dropout_prob", 0.0) > 0
    return int(getattr(config, "num_attention_heads", 0)) if drops else 0
