"""What a sequence classifier takes, found by giving it something.

How many tokens a model has positions for, from which number on it counts them, and
which of the tokenizer's outputs it has a use for differs from family to family, and
says no field of the configuration that all of them have. A short forward pass tells.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lola_flwr.errors import UserError, reason_of, without_directories
from lola_flwr.model.example import token_ids, word_embeddings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_logger = logging.getLogger(__name__)

_PAIR = ("a cat sleeps", "a dog barks")
_TOKEN_TYPES = "token_type_ids"


def check_sequence_length(
    model: nn.Module, sequence_length: int, model_name: str
) -> None:
    """Check that a model takes so many tokens, by giving them to it.

    Parameters
    ----------
    model
        A text model on the CPU, in evaluation mode.
    sequence_length
        Tokens of an example.
    model_name
        What the message calls it.

    Raises
    ------
    UserError
        It takes fewer; the message says how many.
    """
    # No table of positions is longer than the longest there is: more tokens than that
    # need not be tried.
    words = word_embeddings(model)
    tables = [t for t in (*model.parameters(), *model.buffers()) if t is not words]
    longest = max(size for table in tables for size in table.shape)
    tried = min(sequence_length, longest + 1)
    failure = failure_of(model, {"input_ids": token_ids(model, tried)})
    if failure is None:
        return
    good, bad = tried // 2, tried
    while good and failure_of(model, {"input_ids": token_ids(model, good)}):
        good, bad = good // 2, good
    if not good:
        raise UserError(
            f"model={model_name!r} does not run on {sequence_length} tokens "
            f"({reason_of(failure)}), nor on fewer; use another model."
        )
    while bad - good > 1:
        middle = (good + bad) // 2
        if failure_of(model, {"input_ids": token_ids(model, middle)}):
            bad = middle
        else:
            good = middle
    raise UserError(
        f"max-length={sequence_length} exceeds the {good} positions of "
        f"model={model_name!r}; lower it."
    )


def fit_tokenizer(
    name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Check that a tokenizer's output is input of the model, and let it be so.

    What is changed for that is saved with the tokenizer.

    Parameters
    ----------
    name
        What messages call the model.
    model
        The model, on the CPU and in evaluation mode. Its configuration is told the
        token that pads, if it needs to know.
    tokenizer
        Its tokenizer; changed in place.

    Raises
    ------
    UserError
        They do not go together.
    """
    check_vocabulary(name, model, tokenizer)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(
                f"model={name!r}: its tokenizer has neither a pad token nor an end "
                "token; set tokenizer.pad_token and save it anew."
            )
        tokenizer.pad_token = tokenizer.eos_token
    try:
        inputs = dict(tokenizer(*_PAIR, return_tensors="pt"))
    # Tokenizers of documents want more than sentences, each says so in its own way.
    except Exception as error:
        raise UserError(
            f"model={name!r}: its tokenizer does not take a pair of sentences "
            f"({reason_of(error)}); use a model of plain text."
        ) from error
    before = _kinds(model)
    failure = failure_of(model, inputs)
    if failure is not None and inputs.pop(_TOKEN_TYPES, None) is not None:
        # RoBERTa does not tell a pair's sentences apart; a BERT tokenizer numbers them.
        failure = failure_of(model, inputs)
        names = [n for n in tokenizer.model_input_names if n != _TOKEN_TYPES]
        _set(tokenizer, "model_input_names", names)
    if failure is not None:
        raise UserError(
            f"model={name!r} does not run on what its tokenizer makes of a pair of "
            f"sentences ({reason_of(failure)}); use the tokenizer that it was trained "
            "with."
        )
    _refuse_change(name, before, _kinds(model))
    _fit_padding(name, model, tokenizer)


def check_vocabulary(name: str, model: nn.Module, tokenizer: Any) -> None:
    """Check that a tokenizer has a vocabulary, for which the model has embeddings.

    Raises
    ------
    UserError
        It has none, or more tokens than there are embeddings.
    """
    vocabulary = tokenizer.get_vocab()
    # Out of missing files transformers makes a tokenizer of nothing but added tokens.
    if vocabulary.keys() <= tokenizer.get_added_vocab().keys():
        raise UserError(
            f"model={name!r} has no vocabulary: its tokenizer knows {len(tokenizer)} "
            "tokens, all special. Save the tokenizer beside the model, with "
            "tokenizer.save_pretrained."
        )
    words = word_embeddings(model)
    last = max(vocabulary, key=vocabulary.__getitem__)
    if words is not None and vocabulary[last] >= len(words):
        size = vocabulary[last] + 1
        raise UserError(
            f"model={name!r}: its tokenizer has {size} tokens, but its embeddings have "
            f"{len(words)} rows, none for {last!r}. Save it anew after "
            f"model.resize_token_embeddings({size}), or with the tokenizer that it was "
            "trained with."
        )


def _kinds(model: nn.Module) -> dict[str, str]:
    return {name: type(module).__name__ for name, module in model.named_modules()}


def _refuse_change(name: str, before: dict[str, str], after: dict[str, str]) -> None:
    """Refuse a model of which a short input makes another one, for good (BigBird)."""
    for module, kind in after.items():
        if before.get(module) != kind:
            raise UserError(
                f"model={name!r}: a short input turns its {module} from "
                f"{before.get(module)} into {kind} for good, so that what is trained "
                "is not what is loaded; set it to that kind in its config.json "
                '(BigBird: "attention_type": "original_full").'
            )


def _fit_padding(name: str, model: Any, tokenizer: Any) -> None:
    """Let a sentence's logits not depend on the padding beside it.

    A model that looks for a sentence's last token knows it by what pads, or by the side
    of it.
    """
    own, side = getattr(model.config, "pad_token_id", None), tokenizer.padding_side
    if own is None:
        own = model.config.pad_token_id = tokenizer.pad_token_id
    other = "left" if side == "right" else "right"
    for pad_side, pad_id in product((side, other), (own, tokenizer.pad_token_id)):
        model.config.pad_token_id = pad_id
        _set(tokenizer, "padding_side", pad_side)
        if _ignores_padding(model, tokenizer):
            return
    model.config.pad_token_id = own
    _set(tokenizer, "padding_side", side)
    _logger.warning(
        "model=%r: what it says of a sentence depends on the padding beside it, and "
        "differs for the sentence alone",
        without_directories(name),
    )


def _set(tokenizer: Any, key: str, value: Any) -> None:
    """Set an attribute of a tokenizer so that it is saved with it."""
    setattr(tokenizer, key, value)
    tokenizer.init_kwargs[key] = value


def _ignores_padding(model: Any, tokenizer: Any) -> bool:
    """Tell whether a sentence's logits are the same beside a longer one."""
    short, long = _PAIR[0], " ".join(_PAIR)
    with torch.no_grad():
        alone, beside = (
            model(**tokenizer(given, padding=True, return_tensors="pt")).logits[0]
            for given in ([short], [short, long])
        )
    return torch.allclose(alone, beside, rtol=1e-3, atol=1e-5)


def failure_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> Exception | None:
    """Return what keeps a model from running on some inputs; None if it runs."""
    try:
        # No inference mode: what a model keeps from call to call is trained with.
        with torch.no_grad():
            model(**inputs)
    # Whatever indexing, adding and reshaping raise where sizes do not fit.
    except Exception as error:
        return error
    return None
