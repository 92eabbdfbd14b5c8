"""The configured model's blocks and costs, for server and simulated devices alike."""

from __future__ import annotations

from torch import nn

from lola_flwr import model_setup
from lola_flwr.blocks import BlockPartition, partition_parameters
from lola_flwr.system.costs import BlockCosts
from lola_glue.config import GlueConfig


def model_blocks(config: GlueConfig, model: nn.Module) -> BlockPartition:
    """Divide the model: layer by layer, or all of it as one block."""
    layers = _layers(model)
    return layers.merged() if config.method == "fedavg-full" else layers


def model_costs(config: GlueConfig, model: nn.Module) -> BlockCosts:
    """Estimate each block's costs under the run's batch, length and codec."""
    return model_setup.model_costs(
        model,
        _layers(model),
        batch_size=config.batch_size,
        sequence_length=config.max_length,
        codec=config.codec,
        merged=config.method == "fedavg-full",
        micro_batch_size=config.micro_batch_size,
    )


def _layers(model: nn.Module) -> BlockPartition:
    return partition_parameters(name for name, _ in model.named_parameters())
