"""The configured model with its tokenizer and costs, and what it has to be able to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lola_causal.config import CausalConfig
from lola_causal.embedded import (
    EMBEDDED,
    WITHOUT_NETWORK,
    embedded_model,
    embedded_tokenizer,
)
from lola_causal.sequences import Tokens, packed
from lola_flwr.app.config import UpdatesConfig
from lola_flwr.app.model import adapted, model_costs
from lola_flwr.costs.estimated import BlockCosts
from lola_flwr.errors import UserError
from lola_flwr.model.backprop import Batch
from lola_flwr.model.causal import load_causal_lm
from lola_flwr.model.example import token_ids
from lola_flwr.model.inputs import check_sequence_length

# How far the same logits may differ, of the largest: computed in rows of one length,
# and in rows of two.
_SAME, _ROUNDED = 1e-6, 1e-4


def load_base(config: CausalConfig) -> tuple[Any, Any]:
    """Load the model as it is before adapters, and the tokenizer."""
    if config.model == EMBEDDED:
        model, tokenizer = made(config.seed)
    else:
        model, tokenizer = load_causal_lm(
            config.model, seed=config.seed, instead=WITHOUT_NETWORK
        )
    check_sequence_length(model, config.max_length, config.model)
    if config.packing:
        check_packing(model, config.model)
    return model, tokenizer


def load_model(config: CausalConfig) -> tuple[Any, Any]:
    """Load the model, with adapters if they are what is tuned, and the tokenizer."""
    model, tokenizer = load_base(config)
    return adapted(config, model), tokenizer


def made(seed: int) -> tuple[Any, Any]:
    """Make the embedded model and its tokenizer."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return embedded_model().eval(), embedded_tokenizer()


def causal_costs(config: CausalConfig, model: nn.Module) -> BlockCosts:
    """Count each block's costs on a batch as devices draw it."""
    assert isinstance(config, UpdatesConfig)
    tokens = torch.zeros(1, config.max_length, dtype=torch.long)
    beside = "position_ids" if config.packing else "attention_mask"
    # Positions that begin anew in each row's middle; a mask of ones.
    values = torch.ones_like(tokens)
    if config.packing:
        values = (torch.arange(config.max_length) % (config.max_length // 2))[None]
    example: Any = {"input_ids": tokens, beside: values, "labels": tokens}
    example["use_cache"] = False
    return model_costs(config, model, example)


def causal_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean loss of the tokens to be learned; no keys and values are kept."""
    loss: Tensor = model(**batch, use_cache=False).loss
    return loss


def check_packing(model: Any, model_name: str) -> None:
    """Refuse to pack sequences for a model that would let one see the other.

    Raises
    ------
    UserError
        The logits of a sequence depend on the one before it.
    """
    first, second, other = (
        Tokens(tuple(row), 0) for row in token_ids(model, 5, 3).tolist()
    )
    with torch.no_grad():
        behind, behind_other = (
            _logits(model, packed([[one, second]], 0))[0, len(one.ids) :]
            for one in (first, other)
        )
        alone = _logits(model, packed([[second]], 0))[0]
    largest = alone.abs().max()
    if (behind - behind_other).abs().max() > _SAME * largest or (
        (behind - alone).abs().max() > _ROUNDED * largest
    ):
        raise UserError(
            f"packing=true: in model={model_name!r} sequences that share a row see "
            "each other; use packing=false."
        )


def _logits(model: Any, batch: Batch) -> Tensor:
    inputs = {name: values for name, values in batch.items() if name != "labels"}
    try:
        logits: Tensor = model(**inputs, use_cache=False).logits
    except TypeError:
        raise UserError(
            f"packing=true: {type(model).__name__} takes no positions, by which "
            "sequences in one row are told apart; use packing=false."
        ) from None
    return logits
