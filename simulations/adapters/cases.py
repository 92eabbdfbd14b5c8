"""What the sweep goes over: the tuners of peft, those of ours, and six families."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor, nn

from lola_flwr.model.own_tuners import register_own_tuners

_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
}
_TEXT = {"vocab_size": 60, "max_position_embeddings": 40, "pad_token_id": 1}

# Options without which a tuner does not fit models as small as these.
_OPTIONS: dict[str, dict[str, Any]] = {
    "c3a": {"block_size": 16},
    "vblora": {"vector_length": 16, "num_vectors": 8},
}


@dataclass(frozen=True)
class Case:
    """One tuner on one family."""

    family: str
    tuning: str
    task_type: str | None = None

    @property
    def name(self) -> str:
        """The case as a file name."""
        return "-".join(filter(None, asdict(self).values()))

    @property
    def options(self) -> dict[str, Any]:
        """The tuner's options."""
        task = {"task_type": self.task_type} if self.task_type else {}
        return {**_OPTIONS.get(self.tuning, {}), **task}


def tunings() -> list[str]:
    """Return the tuners that peft registers, and those of ours, by name."""
    register_own_tuners()
    return sorted(kind.value.lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING)


def cases(tuning: str, family: str) -> list[Case]:
    """Return the cases of a tuner on a family: without a task type, and with its own.

    Images have none.
    """
    tasks = [None] if family == "vit" else [None, "SEQ_CLS"]
    return [Case(family, tuning, task) for task in tasks]


def base_model(family: str) -> nn.Module:
    """Build a classifier with weights that are the same in every process."""
    torch.manual_seed(0)
    model: nn.Module = FAMILIES[family]().eval()
    return model


def example(family: str) -> dict[str, Tensor]:
    """Return the inputs for four examples, with labels."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.tensor([0, 1, 1, 0])
    if family == "vit":
        images = torch.randn(4, 3, 8, 8, generator=generator)
        return {"pixel_values": images, "labels": labels}
    tokens = torch.randint(5, 60, (4, 10), generator=generator)
    mask = torch.ones_like(tokens)
    tokens[2:, 7:], mask[2:, 7:] = 1, 0
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


FAMILIES: dict[str, Callable[[], Any]] = {
    "bert": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(**_SHAPE, **_TEXT)
    ),
    "roberta": lambda: transformers.RobertaForSequenceClassification(
        transformers.RobertaConfig(**_SHAPE, **_TEXT)
    ),
    "distilbert": lambda: transformers.DistilBertForSequenceClassification(
        transformers.DistilBertConfig(
            dim=64, hidden_dim=128, n_heads=4, n_layers=3, **_TEXT
        )
    ),
    "electra": lambda: transformers.ElectraForSequenceClassification(
        # With a projection in front of the layers.
        transformers.ElectraConfig(embedding_size=32, **_SHAPE, **_TEXT)
    ),
    "vit": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(image_size=8, patch_size=4, **_SHAPE)
    ),
    "llama": lambda: transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(**_SHAPE, **_TEXT)
    ),
}
