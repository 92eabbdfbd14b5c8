"""Parameter shapes of known transformers, without building the model or loading torch.

What a block costs follows from shapes alone, so a plan needs no weights. The names are
those of ``transformers``' sequence classifiers, in the order of ``named_parameters``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lola_flwr.errors import UserError, nearest
from lola_flwr.machine.files import local_path


@dataclass(frozen=True)
class ModelShapes:
    """What the cost model needs to know of a model.

    Parameters
    ----------
    shapes
        Shape of every parameter, in the order in which the modules run.
    dropout_heads
        Attention heads if training drops attention weights out, else 0.
    """

    shapes: Mapping[str, tuple[int, ...]]
    dropout_heads: int


_BERT_BASE = {
    "model_type": "bert",
    "attention_probs_dropout_prob": 0.1,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "type_vocab_size": 2,
    "vocab_size": 30522,
}
_ROBERTA_BASE = {
    **_BERT_BASE,
    "model_type": "roberta",
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "vocab_size": 50265,
}
# The fields of these models' config.json that shapes and costs depend on.
KNOWN_MODELS: Mapping[str, Mapping[str, Any]] = {
    "minilm-l6": {
        **_BERT_BASE,
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
    },
    "bert-base": _BERT_BASE,
    "distilroberta-base": {**_ROBERTA_BASE, "num_hidden_layers": 6},
    "roberta-base": _ROBERTA_BASE,
    "roberta-large": {
        **_ROBERTA_BASE,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
    },
}


def model_shapes(model: str, *, num_labels: int = 2) -> ModelShapes:
    """Return the shapes of a model.

    Parameters
    ----------
    model
        A name from `KNOWN_MODELS`; an owner before it and ``random:`` are left out:
        ``"FacebookAI/roberta-base"``.
    num_labels
        Classes of its head.

    Raises
    ------
    UserError
        No such model.
    """
    name = model.removeprefix("random:").rpartition("/")[2]
    if name not in KNOWN_MODELS:
        raise UserError(
            f"model={model!r} is neither a directory with a config.json nor one of "
            f"{', '.join(KNOWN_MODELS)}.{nearest(name, KNOWN_MODELS)}"
        )
    config = KNOWN_MODELS[name]
    drops = config["attention_probs_dropout_prob"] > 0
    return ModelShapes(
        shapes=dict(_encoder(config["model_type"] == "bert", config, num_labels)),
        dropout_heads=int(config["num_attention_heads"]) if drops else 0,
    )


def config_file(model: str) -> Path | None:
    """Return the ``config.json`` that is, or is in, a path; None: it is a name."""
    path = local_path(model)
    if path.is_file():
        return path
    return path / "config.json" if path.is_dir() else None


def _encoder(
    is_bert: bool, config: Mapping[str, Any], num_labels: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, wide = int(config["hidden_size"]), int(config["intermediate_size"])

    def linear(name: str, inputs: int, outputs: int) -> Iterator[Any]:
        yield f"{name}.weight", (outputs, inputs)
        yield f"{name}.bias", (outputs,)

    def norm(name: str) -> Iterator[Any]:
        yield f"{name}.weight", (hidden,)
        yield f"{name}.bias", (hidden,)

    body = "bert" if is_bert else "roberta"
    for table, rows in (
        ("word", "vocab_size"),
        ("token_type", "type_vocab_size"),
        ("position", "max_position_embeddings"),
    ):
        yield (
            f"{body}.embeddings.{table}_embeddings.weight",
            (int(config[rows]), hidden),
        )
    yield from norm(f"{body}.embeddings.LayerNorm")
    for number in range(int(config["num_hidden_layers"])):
        layer = f"{body}.encoder.layer.{number}"
        for part in ("query", "key", "value"):
            yield from linear(f"{layer}.attention.self.{part}", hidden, hidden)
        yield from linear(f"{layer}.attention.output.dense", hidden, hidden)
        yield from norm(f"{layer}.attention.output.LayerNorm")
        yield from linear(f"{layer}.intermediate.dense", hidden, wide)
        yield from linear(f"{layer}.output.dense", wide, hidden)
        yield from norm(f"{layer}.output.LayerNorm")
    if is_bert:
        yield from linear("bert.pooler.dense", hidden, hidden)
        yield from linear("classifier", hidden, num_labels)
    else:
        yield from linear("classifier.dense", hidden, hidden)
        yield from linear("classifier.out_proj", hidden, num_labels)
