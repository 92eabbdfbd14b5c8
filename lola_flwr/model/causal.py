"""Load a causal language model to fine-tune, and see that it is one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lola_flwr.errors import UserError, reason_of
from lola_flwr.machine.files import expanded
from lola_flwr.model.example import token_ids
from lola_flwr.model.inputs import check_vocabulary
from lola_flwr.model.loading import quiet_transformers
from lola_flwr.model.sources import configured_directory, not_found, refuse_pickle
from lola_flwr.model.stored_base import keep_differentiable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_INSTEAD = (
    "a directory with config.json, model.safetensors and tokenizer files, or "
    "model='random:DIR', where DIR has a config.json and tokenizer files."
)

# Between the same logits before tokens that differ, of the largest.
_ROUNDING = 1e-6


def load_causal_lm(
    name: str, *, seed: int = 0, instead: str = _INSTEAD
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer.

    Parameters
    ----------
    name
        A directory in Hugging Face format, a hub id, or ``"random:DIR"``: random
        weights under the configuration in a directory, which has the tokenizer, too.
    seed
        Seed of random weights.
    instead
        What to use without a network, for the message.

    Returns
    -------
    The model in evaluation mode, with float32 weights (a quantised one as it is
    stored), and the tokenizer, which pads by its end token if it has none to pad with.
    The caller's random numbers stay as they were.

    Raises
    ------
    ModelNotFound
        No such model here, or its files are not usable.
    UserError
        Model and tokenizer do not go together, or the model reads ahead.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model, tokenizer = _loaded(name, instead)
    keep_differentiable(model)  # before it is run
    check_vocabulary(name, model.eval(), tokenizer)
    if tokenizer.eos_token is None:
        raise UserError(
            f"model={name!r}: its tokenizer has no end token, by which a completion "
            "would end; set tokenizer.eos_token and save it anew."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    check_causal(model, name)
    return model, tokenizer


def _loaded(name: str, instead: str) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    configured = configured_directory(name)
    source = expanded(name) if configured is None else str(configured)
    refuse_pickle(name, Path(source))
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            if configured is not None:
                config = AutoConfig.from_pretrained(source, trust_remote_code=False)
                return AutoModelForCausalLM.from_config(
                    config, dtype=torch.float32
                ), tokenizer
            model, loading = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=torch.float32,
                # Neither a pickle nor the directory may run code, nor anybody be asked.
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    # A damaged file raises whatever its parser raises; some raise plain Exception.
    except Exception as error:
        raise not_found(name, reason_of(error), instead) from error
    if missing := sorted(loading["missing_keys"]):
        raise UserError(
            f"model={name!r} is no whole causal language model: its files lack "
            f"{missing[0]}, which would be random; use one that was trained for it."
        )
    return model, tokenizer


def check_causal(model: Any, name: str) -> None:
    """Refuse a model whose tokens see those that come after them.

    Raises
    ------
    UserError
        They do, or it does not run on tokens alone.
    """
    ids = token_ids(model, 4).repeat(2, 1)
    ids[1, -1] = ids[1, 0]
    try:
        with torch.no_grad():
            first, second = model(input_ids=ids).logits[:, :-1].float()
    # Whatever a model raises that wants more than tokens.
    except Exception as error:
        raise UserError(
            f"model={name!r} does not predict tokens from tokens ({reason_of(error)}); "
            "use a causal language model."
        ) from error
    if (first - second).abs().max() > _ROUNDING * first.abs().max():
        raise UserError(
            f"model={name!r}: what it says of a token depends on those after it, which "
            "it is to predict; use a causal language model."
        )
