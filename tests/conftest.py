"""Shared fixtures: tiny models of several families, and seeded random generators."""

from __future__ import annotations

import gc
import os
from typing import TYPE_CHECKING

# Two cores, several test processes, and programs that these start: one thread each.
# PyTorch and NumPy read it when they are loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import numpy as np
import pytest

if TYPE_CHECKING:
    import torch
    import transformers

# The same examples every time, and no verdict about time: the machine may be busy.
hypothesis.settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("repeatable")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Import PyTorch where tests run, and not where they are handed out."""
    config = session.config
    if config.getoption("numprocesses", 0) and not hasattr(config, "workerinput"):
        return
    gc.disable()
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()


def pytest_collection_finish() -> None:
    """Leave a million objects of libraries out of every later garbage collection."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that run Flower, so that no process waits for another's."""
    first = {item.path for item in items if item.get_closest_marker("flower_run")}
    items.sort(key=lambda item: item.path not in first)


SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": 60,
}


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20260101)


@pytest.fixture
def roberta() -> transformers.PreTrainedModel:
    """A three-layer RoBERTa classifier with random weights."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.RobertaConfig(**SMALL, max_position_embeddings=40)
    return transformers.RobertaForSequenceClassification(config).eval()


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Six token sequences of length 10, the last two padded."""
    import torch

    torch.manual_seed(1)
    input_ids = torch.randint(5, 60, (6, 10))
    attention_mask = torch.ones_like(input_ids)
    input_ids[4:, 7:] = 1
    attention_mask[4:, 7:] = 0
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": torch.tensor([0, 1, 1, 0, 1, 0]),
    }
