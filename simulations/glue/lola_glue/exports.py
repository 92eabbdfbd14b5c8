"""The model of a run as `lola-flwr export` writes it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lola_flwr.app.exports import batch_size_of, example_of, exportable, of_one_batch
from lola_flwr.app.model import model_costs
from lola_flwr.export.describe import ExportedModel
from lola_glue.config import GlueConfig
from lola_glue.costs import load_model, model_blocks
from lola_glue.tasks import load_task
from lola_glue.text import make_batch


def exported(run_config: Mapping[str, object]) -> ExportedModel:
    """Return what a run trains, with an example as its devices have them.

    Raises
    ------
    UserError
        The configuration is wrong, or its run is none for exported programs.
    """
    config = GlueConfig.from_run_config(of_one_batch(run_config))
    costed = exportable(config)
    task, train, _ = load_task(config.task, config.data_dir, seed=config.seed)
    model, tokenizer = load_model(config, task)
    first = np.zeros(1, np.intp)
    batch = make_batch(train, first, tokenizer, max_length=config.max_length)
    return ExportedModel(
        name=config.model,
        model=model,
        partition=model_blocks(config, model),
        example=example_of(batch, config.max_length),
        batch_size=batch_size_of(config),
        sequence_length=config.max_length,
        costs=model_costs(costed, model),
    )
