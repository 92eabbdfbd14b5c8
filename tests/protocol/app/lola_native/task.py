"""The model, its coordinator and a device's examples."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
import transformers

from lola_flwr.build import RoundSettings, ServerStep, coordinator_for
from lola_flwr.costs.of_model import model_costs
from lola_flwr.device.block_device import BlockDevice
from lola_flwr.export.data import ArrayFiles
from lola_flwr.model.adapter_blocks import model_partition
from lola_flwr.server.settings import DeviceOptions

BATCH_SIZE, TOKENS, DEVICES = 6, 10, 3
NAMES = ("input_ids", "attention_mask", "labels")


@cache
def load_model(directory):
    """Return the model and its blocks."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(directory)
    return model, model_partition(model)


def make_coordinator(directory):
    """Return what plans the rounds, by what devices claim: they are of one speed."""
    model, partition = load_model(directory)
    return coordinator_for(
        model,
        partition,
        costs=model_costs(
            model, partition, batch_size=BATCH_SIZE, sequence_length=TOKENS
        ),
        batch_size=BATCH_SIZE,
        step=ServerStep(lr=1e-2),
        settings=RoundSettings(devices=DeviceOptions(correct_profiles=False)),
    )


def make_device(profile, index, model, data):
    """Return a device with PyTorch."""
    draw = ArrayFiles.in_directory(Path(data) / f"device-{index}", NAMES, seed=index)
    return BlockDevice(
        profile=profile,
        load_model=lambda: load_model(model),
        batch_source=lambda *given: {
            name: torch.from_numpy(array) for name, array in draw(*given).items()
        },
    )
