"""The configured model with its blocks and costs, for server and devices alike."""

from __future__ import annotations

from typing import Any

from torch import nn

from lola_flwr.app.model import adapted, model_blocks, model_layers
from lola_flwr.app.model import model_costs as costs_without_pool
from lola_flwr.costs import of_model
from lola_flwr.costs.estimated import BlockCosts
from lola_flwr.device.sampler_options import History
from lola_flwr.model.inputs import check_sequence_length
from lola_flwr.model.loading import load_classifier
from lola_glue.config import GlueConfig, SampledConfig
from lola_glue.tasks import Task

__all__ = ["load_base", "load_model", "model_blocks", "model_costs"]


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
    return adapted(config, model), tokenizer


def model_costs(config: SampledConfig, model: nn.Module) -> BlockCosts:
    """Count each block's costs under the run's batch and length.

    With a sampler the forward pass over its pool counts, if it has one.
    """
    costs = costs_without_pool(config, model)
    rule = config.chosen_by
    if rule is None or isinstance(rule, History):
        return costs
    return of_model.with_pool(
        costs,
        model,
        model_layers(config, model),
        batch_size=config.largest_batch,
        sequence_length=config.max_length,
        pool_factor=rule.pool_factor,
    )
