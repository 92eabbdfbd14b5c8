"""The model of a run as `lola-flwr export` writes it."""

from __future__ import annotations

from collections.abc import Mapping

from lola_causal.config import CausalConfig
from lola_causal.model import causal_costs, causal_loss, load_model
from lola_causal.records import load_records
from lola_causal.sequences import encode, padded
from lola_flwr.app.exports import batch_size_of, example_of, exportable, of_one_batch
from lola_flwr.app.model import model_blocks
from lola_flwr.errors import UserError
from lola_flwr.export.describe import ExportedModel


def exported(run_config: Mapping[str, object]) -> ExportedModel:
    """Return what a run trains, with an example as its devices have them.

    Raises
    ------
    UserError
        The configuration is wrong, or its run is none for exported programs.
    """
    config = CausalConfig.from_run_config(of_one_batch(run_config))
    if config.packing:
        raise UserError(
            "packing=true: rows of several sequences have no program; set "
            "packing=false."
        )
    exportable(config)
    train, _ = load_records(config.data, config.eval_data, seed=config.seed)
    model, tokenizer = load_model(config)
    sequences = encode(
        train[:1], tokenizer, max_length=config.max_length, model_name=config.model
    )
    batch = padded(sequences, tokenizer.pad_token_id)
    return ExportedModel(
        name=config.model,
        model=model,
        partition=model_blocks(config, model),
        example=example_of(batch, config.max_length),
        batch_size=batch_size_of(config),
        sequence_length=config.max_length,
        costs=causal_costs(config, model),
        loss_function=causal_loss,
    )
