"""The configured model with its blocks and costs, for server and devices alike."""

from __future__ import annotations

from typing import Any

from torch import nn

from lola_flwr.costs import of_model
from lola_flwr.costs.estimated import BlockCosts
from lola_flwr.device.sampling import POOL_FACTOR
from lola_flwr.model.adapter_blocks import model_partition
from lola_flwr.model.adapters import adapt
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.model.inputs import check_sequence_length
from lola_flwr.model.loading import load_classifier
from lola_glue.config import (
    FedAvgFullConfig,
    GlueConfig,
    UpdatesConfig,
    keyword_arguments,
)
from lola_glue.tasks import Task


def load_base(config: GlueConfig, task: Task) -> tuple[Any, Any]:
    """Load the model as it is before adapters, and the tokenizer."""
    model, tokenizer = load_classifier(
        config.model,
        num_labels=task.num_labels,
        class_names=task.class_names,
        seed=config.seed,
    )
    check_sequence_length(model, config.max_length, config.model)
    # Saved with it: whoever lets it cut sentences has those that were trained with.
    tokenizer.model_max_length = config.max_length
    return model, tokenizer


def load_model(config: GlueConfig, task: Task) -> tuple[Any, Any]:
    """Load the model, with adapters if they are what is tuned, and the tokenizer."""
    model, tokenizer = load_base(config, task)
    options = keyword_arguments(config.tuning_options)
    return adapt(model, config.tuning, options, seed=config.seed), tokenizer


def model_blocks(config: GlueConfig, model: nn.Module) -> BlockPartition:
    """Divide the model: layer by layer, or all of it as one block."""
    layers = _layers(config, model)
    return layers.merged() if isinstance(config, FedAvgFullConfig) else layers


def model_costs(config: UpdatesConfig, model: nn.Module) -> BlockCosts:
    """Count each block's costs under the run's batch and length.

    With a sampler the forward pass over its pool counts.
    """
    layers = _layers(config, model)
    sizes: dict[str, Any] = {
        "batch_size": config.batch_size,
        "sequence_length": config.max_length,
    }
    options: dict[str, Any] = {
        **sizes,
        "merged": isinstance(config, FedAvgFullConfig),
        "micro_batch_size": config.micro_batch_size,
    }
    costs = of_model.model_costs(model, layers, **options)
    if config.sampler == "random":
        return costs
    return of_model.with_pool(costs, model, layers, **sizes, pool_factor=POOL_FACTOR)


def _layers(config: GlueConfig, model: nn.Module) -> BlockPartition:
    return model_partition(
        model, stack=config.stack or None, blocks=config.blocks or None
    )
