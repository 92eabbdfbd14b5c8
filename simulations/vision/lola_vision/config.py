"""The app's run configuration, checked once and completely."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lola_flwr.run.config import RunConfig

# Heads of attention; the hidden size is a multiple of it.
NUM_HEADS = 4


class VisionConfig(RunConfig):
    """Run configuration; the keys are those of ``[tool.flwr.app.config]``."""

    interface: Literal["legacy", "message"]
    data_dir: str
    image_size: int = Field(ge=8)
    patch_size: int = Field(ge=1)
    layers: int = Field(ge=2)
    hidden_size: int = Field(ge=NUM_HEADS, multiple_of=NUM_HEADS)
    rounds: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    lr: float = Field(gt=0)
    bandwidth_hz: float = Field(gt=0, allow_inf_nan=False)
    seed: int = Field(ge=0)
    output_dir: str
