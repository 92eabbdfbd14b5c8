"""What an app exports: a run in which devices with programs take part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lola_flwr.app.batches import batches_and_codec
from lola_flwr.app.config import AppConfig, LolaDeftConfig
from lola_flwr.errors import UserError

if TYPE_CHECKING:
    from lola_flwr.model.backprop import Batch


def exportable(config: AppConfig) -> LolaDeftConfig:
    """Return a configuration whose model can be exported as the run trains it.

    Raises
    ------
    UserError
        In the run devices do what no program does, or hold other frozen weights.
    """
    if not isinstance(config, LolaDeftConfig):
        raise UserError(
            f"method={config.method!r}: exported programs train blocks; set "
            "method='lola-deft'."
        )
    for key, value, needed in (
        ("base", config.base, "fp32"),
        ("precision", config.precision, "fp32"),
        ("activations", config.activations, "exact"),
    ):
        if value != needed:
            raise UserError(
                f"{key}={value!r}: exported programs compute in float32; set "
                f"{key}={needed!r}."
            )
    if config.zeroth_order == "always":
        raise UserError(
            "zeroth-order='always': exported programs back-propagate; set "
            "zeroth-order='fallback' or 'off'."
        )
    return config


def of_one_batch(run_config: Mapping[str, object]) -> dict[str, object]:
    """Return a run configuration whose batch size, where it says none, is a number.

    In a run whose rounds choose batches devices with programs have those of theirs.
    """
    return {**run_config, **batches_and_codec(run_config, one_batch=True)}


def batch_size_of(config: AppConfig) -> int:
    """Return how many examples a program computes.

    Raises
    ------
    UserError
        Rounds choose that, and a program has one batch size.
    """
    if isinstance(config.batch_size, str):
        raise UserError(
            f"batch-size={config.batch_size!r}: an exported program has one batch "
            "size; set batch-size to a number."
        )
    return config.batch_size


def example_of(batch: Batch, num_tokens: int) -> Batch:
    """Return a batch's first example with so many tokens, whichever they are.

    Parameters
    ----------
    batch
        A batch as devices draw it: what has two dimensions has a column a token.
    num_tokens
        How many there are to be.
    """
    return {
        name: tensor[:1] if tensor.dim() < 2 else tensor[:1, :1].repeat(1, num_tokens)
        for name, tensor in batch.items()
    }
