"""The configured model's blocks and costs, for server and simulated devices alike."""

from __future__ import annotations

from torch import nn

from lola_flwr.blocks import BlockPartition, partition_parameters
from lola_flwr.codec import NPY_HEADER_BYTES, codec_named
from lola_flwr.system.costs import BlockCosts, estimate_costs
from lola_glue.config import GlueConfig


def model_blocks(config: GlueConfig, model: nn.Module) -> BlockPartition:
    """Divide the model: layer by layer, or all of it as one block."""
    layers = partition_parameters(name for name, _ in model.named_parameters())
    return layers.merged() if config.method == "fedavg-full" else layers


def model_costs(config: GlueConfig, model: nn.Module) -> BlockCosts:
    """Estimate each block's costs under the run's batch, length and codec."""
    shapes = {name: tuple(values.shape) for name, values in model.named_parameters()}
    return estimate_costs(
        shapes,
        partition_parameters(shapes),
        batch_size=config.batch_size,
        sequence_length=config.max_length,
        bits_per_element=codec_named(config.codec).bits_per_element,
        header_bits_per_tensor=8 * NPY_HEADER_BYTES,
        dropout_heads=_dropout_heads(model),
        merged=config.method == "fedavg-full",
    )


def _dropout_heads(model: nn.Module) -> int:
    """Return the attention heads if training drops attention weights out, else 0."""
    config = model.config
    drops = getattr(config, "attention_probs_dropout_prob", 0.0) > 0
    return int(getattr(config, "num_attention_heads", 0)) if drops else 0
