"""Make a model's input for one example: its shapes and types, from the configuration.

For the models of ``transformers`` whose class says what they are for, and for plain
modules that take one tensor, of one size. All others need an example of their input,
and are refused with a line that gives it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lola_flwr.errors import UserError
from lola_flwr.model.example import example_of, spelled
from lola_flwr.model.plain_input import plain_input

# A class of transformers' automatic models -> the shape of one example's labels: one
# number for each token, or one in all.
_LABELS = {
    "CAUSAL_LM": "tokens",
    "MASKED_LM": "tokens",
    "SEQ_TO_SEQ_CAUSAL_LM": "tokens",
    "SPEECH_SEQ_2_SEQ": "tokens",
    "TOKEN_CLASSIFICATION": "tokens",
    "SEQUENCE_CLASSIFICATION": "class",
    "IMAGE_CLASSIFICATION": "class",
    "AUDIO_CLASSIFICATION": "class",
    "QUESTION_ANSWERING": "span",
}


# What follows from a configuration: of each main input, the entry that says its size.
# (Of all others `lola_flwr.model.example` makes up a size, and costs hang on it.)
_SAYS_SIZE = {
    "pixel_values": "image_size",
    "input_features": "max_source_positions",
}


def training_example(
    model: nn.Module, sequence_length: int
) -> Tensor | dict[str, Tensor]:
    """Return a model's input and labels for one example; values say nothing.

    Parameters
    ----------
    model
        The model, with or without adapters.
    sequence_length
        Tokens of an example, where the model reads tokens or writes them; 1 where
        examples of a plain module are no sequences.

    Raises
    ------
    UserError
        The model's input does not follow from its configuration.
    """
    base: Any = model
    if hasattr(model, "peft_config"):
        base = base.get_base_model()
    main = getattr(base, "main_input_name", None)
    taken = inspect.signature(base.forward).parameters
    if main is None or not hasattr(base, "config"):
        plain = plain_input(base, sequence_length)
        if plain.example is None or not plain.known:
            raise _unknown(model, plain.example)
        return plain.example
    kind = _labels_of(base)
    example: dict[str, Tensor] = {}
    tokens = torch.zeros(1, sequence_length, dtype=torch.long)
    if main == "input_ids" or hasattr(base.config, _SAYS_SIZE.get(main, "")):
        made = example_of(base, num_tokens=sequence_length)
        example = {name: values.cpu() for name, values in made.items()}
        tokens = example.get("input_ids", tokens)
    if main == "input_ids" and "attention_mask" in taken:
        example["attention_mask"] = torch.ones_like(tokens)
    label = dict(_labels(base.config, kind, tokens))
    if not example or (kind is None and "labels" in taken):
        raise _unknown(model, _guess(main, example, label, tokens))
    if label:
        # A decoder's input is then made from the labels, as in training.
        example.pop("decoder_input_ids", None)
    return {**example, **label}


def _unknown(
    model: nn.Module, guess: Tensor | Mapping[str, Tensor] | None
) -> UserError:
    shown = "" if guess is None else f"{spelled(guess)}, or "
    return UserError(
        f"What {type(model).__name__} reads does not follow from the model, and its "
        f"costs are counted on that: pass example={shown}whatever its input for one "
        "example is."
    )


def _labels_of(model: nn.Module) -> str | None:
    """Return the kind of labels that a model's class takes, by transformers' lists."""
    from transformers.models.auto import modeling_auto

    ancestors = {ancestor.__name__ for ancestor in type(model).__mro__}
    for task, kind in _LABELS.items():
        for names in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").values():
            known = (names,) if isinstance(names, str) else names
            if not ancestors.isdisjoint(known):
                return kind
    return None


def _labels(
    config: Any, kind: str | None, tokens: Tensor
) -> Iterator[tuple[str, Tensor]]:
    one = torch.zeros(1, dtype=torch.long)
    if kind == "tokens":
        yield "labels", tokens
    elif kind == "span":
        yield "start_positions", one
        yield "end_positions", one
    elif kind == "class":
        problem = getattr(config, "problem_type", None)
        if problem == "multi_label_classification":
            yield "labels", torch.zeros(1, config.num_labels)
        elif problem == "regression" or (problem is None and config.num_labels == 1):
            yield "labels", torch.zeros(1, config.num_labels).squeeze(-1)
        else:
            yield "labels", one


def _guess(
    main: str, example: dict[str, Tensor], label: dict[str, Tensor], tokens: Tensor
) -> dict[str, Tensor]:
    likely = {
        "pixel_values": torch.zeros(1, 3, 224, 224),
        "input_values": torch.zeros(1, 16000),  # a second of sound
        "input_features": torch.zeros(1, 80, 3000),
    }
    known = example or {main: likely.get(main, tokens)}
    return {**known, **(label or {"labels": torch.zeros(1, dtype=torch.long)})}
