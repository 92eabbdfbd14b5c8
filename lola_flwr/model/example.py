"""An input made up for a model, by which its forward pass can be watched."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from lola_flwr.errors import UserError

# An example is short: so many tokens, pixels on a side, samples of sound and frames.
_NUM_TOKENS = 7
_NUM_PIXELS = 64
_NUM_SAMPLES = 4800  # 60 frames of 5 ms
_NUM_FRAMES = 64


def example_of(
    model: nn.Module, batch_size: int = 1, *, num_tokens: int = _NUM_TOKENS
) -> dict[str, Tensor]:
    """Make up an input that a model of transformers computes its output from.

    Parameters
    ----------
    model
        The model; its configuration and the arguments that it takes tell the shapes.
    batch_size
        Examples, which differ from each other.
    num_tokens
        Tokens of a text.

    Returns
    -------
    Arguments of the model: its main input, and what it does not run without.

    Raises
    ------
    UserError
        The model is none of transformers, or takes an input that is not known here.
    """
    base: Any = getattr(model, "get_base_model", lambda: model)()
    kind = getattr(base, "main_input_name", None)
    make = _MADE.get(kind) if hasattr(base, "config") else None
    choices = 2 if _chooses_between_texts(base) else 1
    values = None if make is None else make(base, choices * batch_size, num_tokens)
    if values is None:
        raise UserError(
            f"What {type(base).__name__} takes as input is not known here; pass "
            "example=, its arguments for an example, as {'input_ids': ...}."
        )
    if choices > 1:
        values = values.reshape(batch_size, choices, *values.shape[1:])
    example = {str(kind): values}
    accepted = inspect.signature(base.forward).parameters
    if "decoder_input_ids" in accepted and base.config.is_encoder_decoder:
        example["decoder_input_ids"] = token_ids(base, num_tokens, batch_size)
    if "bbox" in accepted:  # where each token stands on its page
        corners = torch.arange(4 * num_tokens).reshape(num_tokens, 4) // 4
        example["bbox"] = corners.expand(batch_size, -1, -1)
    return example


def examples_of(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Give an example on a model's device, or nothing where none can be made up."""
    try:
        example = example_of(model)
    except UserError:
        return
    place = next(model.parameters()).device
    yield {name: values.to(place) for name, values in example.items()}


def token_ids(model: nn.Module, length: int, batch_size: int = 1) -> Tensor:
    """Return sequences of tokens that a model takes for words, ended; [batch, length].

    Neither padding is among them, which some models do not count, nor what stands for
    an image or a sound.
    """
    config: Any = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    table = word_embeddings(model)
    known = range(len(table) if table is not None else 100)
    reserved = {getattr(module, "padding_idx", None) for module in model.modules()}
    for name, value in config.to_dict().items():
        if name.endswith(("_token_id", "_token_index")):
            reserved.update(value if isinstance(value, list) else [value])
    words = list(
        islice((n for n in known if n not in reserved), _NUM_TOKENS + batch_size)
    )
    places = torch.arange(length) + torch.arange(batch_size)[:, None]
    ids = torch.tensor(words)[places % len(words)]
    end = getattr(config, "eos_token_id", None)
    if isinstance(end, int) and end in known:
        # An encoder with a decoder classifies what it makes of the end.
        ids[:, -1] = end
    return ids


def spelled(example: Tensor | Mapping[str, Any]) -> str:
    """Write an example as Python would make it."""
    if isinstance(example, Tensor):
        shape = ", ".join(map(str, example.shape))
        kind = "" if example.dtype == torch.float32 else f", dtype={example.dtype}"
        return f"torch.zeros({shape}{kind})"
    parts = [
        f'"{name}": {spelled(value) if isinstance(value, Tensor) else repr(value)}'
        for name, value in example.items()
    ]
    return "{" + ", ".join(parts) + "}"


def word_embeddings(model: Any) -> Tensor | None:
    """Return the table of word embeddings; None where words are hashed (CANINE)."""
    try:
        return getattr(model.get_input_embeddings(), "weight", None)
    except NotImplementedError:
        return None


def _chooses_between_texts(model: nn.Module) -> bool:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES as CLASSES,
    )

    return type(model).__name__ in CLASSES.values()


def _tokens(model: nn.Module, batch_size: int, num_tokens: int) -> Tensor:
    return token_ids(model, num_tokens, batch_size)


def _pixels(model: Any, batch_size: int, _: int) -> Tensor:
    """Make up images, or videos where the configuration has frames."""
    config = _part(model.config, "vision_config")
    size = _first(config, "image_size", "crop_size") or _NUM_PIXELS
    sides = size if isinstance(size, Iterable) else (size, size)
    frames = _first(config, "num_frames", "frames_per_clip")
    channels = getattr(config, "num_channels", 3)
    return _noise(batch_size, *([frames] if frames else []), channels, *sides)


def _sound(model: Any, batch_size: int, _: int) -> Tensor:
    """Make up waves; or spectrograms, cut to a length that the configuration has."""
    config = _part(model.config, "encoder")
    bins, frames = _first(config, "num_mel_bins"), _first(config, "max_length")
    if bins and frames:
        return _noise(batch_size, frames, bins)
    return _noise(batch_size, _NUM_SAMPLES)


def _spectrogram(model: Any, batch_size: int, _: int) -> Tensor | None:
    """Make up spectrograms: by bins, then by as many frames as a model has places."""
    config = _part(model.config, "audio_config", "encoder_config", "encoder")
    bins, places = (_first(config, n) for n in ("num_mel_bins", "max_source_positions"))
    if bins and places:
        return _noise(batch_size, bins, 2 * places)
    features = _first(
        config,
        "input_feat_per_channel",
        "feature_projection_input_dim",
        "num_mel_bins",
        "input_dim",
    )
    return _noise(batch_size, _NUM_FRAMES, features) if features else None


def _part(config: Any, *names: str) -> Any:
    """Return the configuration of a part of a model, if it has one of its own."""
    for name in names:
        config = getattr(config, name, config)
    return config


def _first(config: Any, *names: str) -> Any:
    """Return the first of some entries that a configuration has."""
    return next((v for n in names if (v := getattr(config, n, None))), None)


def _noise(*shape: int) -> Tensor:
    """Return the same random numbers every time, and leave the caller's alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


# Main input -> how it is made up, from model, examples and tokens.
_MADE: dict[str | None, Callable[[Any, int, int], Tensor | None]] = {
    "input_ids": _tokens,
    "pixel_values": _pixels,
    "pixel_values_videos": _pixels,
    "input_values": _sound,
    "input_features": _spectrogram,
}
