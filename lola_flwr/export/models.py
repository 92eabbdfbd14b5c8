"""The model that a run trains, by its name, as it is exported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lola_flwr.costs.examples import training_example
from lola_flwr.costs.of_model import model_costs
from lola_flwr.export.describe import ExportedModel
from lola_flwr.model.adapter_blocks import model_partition
from lola_flwr.model.adapters import FULL, adapt
from lola_flwr.model.backprop import Batch, model_loss
from lola_flwr.model.causal import load_causal_lm
from lola_flwr.model.inputs import check_sequence_length
from lola_flwr.model.loading import load_classifier

Task = Literal["classification", "causal"]


@dataclass(frozen=True, kw_only=True)
class NamedModel:
    """What a run trains; these are the keys of its configuration.

    Parameters
    ----------
    model
        As for `load_classifier`, or `load_causal_lm` where the task is causal.
    task
        What the model is trained for.
    num_labels
        Classes; 1 makes a regression.
    tuning, tuning_options
        As for `adapt`.
    stack
        As for `model_partition`.
    seed
        Seed of weights that are not loaded, and of adapters.
    """

    model: str
    task: Task = "classification"
    num_labels: int = 2
    tuning: str = FULL
    tuning_options: Mapping[str, Any] = field(default_factory=dict)
    stack: str | None = None
    seed: int = 0


def load_exported(
    named: NamedModel, *, batch_size: int, sequence_length: int
) -> ExportedModel:
    """Load a model to export its steps.

    Parameters
    ----------
    named
        The model.
    batch_size, sequence_length
        Examples of a mini-batch, and tokens of each.

    Raises
    ------
    UserError
        There is no such model, or it does not take so many tokens.
    """
    if named.task == "causal":
        model, tokenizer = load_causal_lm(named.model, seed=named.seed)
    else:
        model, tokenizer = load_classifier(
            named.model, num_labels=named.num_labels, seed=named.seed
        )
    check_sequence_length(model, sequence_length, named.model)
    adapted = adapt(model, named.tuning, named.tuning_options, seed=named.seed)
    example = training_example(adapted, sequence_length)
    assert not isinstance(example, Tensor)  # models of transformers have names for it
    for name in tokenizer.model_input_names:
        if name not in example:
            example[name] = torch.zeros_like(example["input_ids"])
    partition = model_partition(adapted, stack=named.stack)
    return ExportedModel(
        name=named.model,
        model=adapted,
        partition=partition,
        example=example,
        batch_size=batch_size,
        sequence_length=sequence_length,
        costs=model_costs(
            adapted,
            partition,
            batch_size=batch_size,
            sequence_length=sequence_length,
            example=example,
        ),
        loss_function=_causal_loss if named.task == "causal" else model_loss,
    )


def _causal_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean loss of the tokens to be learned; no keys and values are kept."""
    loss: Tensor = model(**batch, use_cache=False).loss
    return loss
