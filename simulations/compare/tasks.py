"""What is learned: a text task on MiniLM, an image task on a small ViT."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lola_flwr.arrays import IntArray
from lola_flwr.model.adapter_blocks import model_partition
from lola_flwr.model.backprop import Batch
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.model.loading import load_classifier
from lola_flwr.randomness import rng_for
from lola_glue.partitions import partition_examples
from lola_glue.server_app import evaluate_model
from lola_glue.tasks import load_task
from lola_glue.text import make_batch
from lola_vision.config import VisionConfig
from lola_vision.images import load_images
from lola_vision.model import build

# Sentences are cut to so many tokens; the cost model assumes this length.
_MAX_LENGTH = 64
PATCH_SIZE = 8
_VIT = {
    "data-dir": "",
    "image-size": 32,
    "patch-size": PATCH_SIZE,
    "layers": 4,
    "hidden-size": 64,
    "bandwidth-hz": 20e6,
}


@dataclass(frozen=True, eq=False)
class Task:
    """A model to fine-tune, its devices' data, and what it is judged by.

    Parameters
    ----------
    name
        Name for the tables.
    model
        The model, with the values to start from.
    sequence_length
        Tokens of an example, as the cost model assumes.
    lr
        Learning rate of AdamW on the server.
    draw
        Draws a mini-batch: (device, round, batch_size).
    examples
        Gives those of a device's examples that are in some rows: (device, rows).
    num_examples
        Examples that a device holds.
    proxy
        Examples that the server holds.
    evaluate
        Gives loss and metrics of the model's present values on held-out examples, the
        primary metric first.
    """

    name: str
    model: nn.Module
    sequence_length: int
    lr: float
    draw: Callable[[int, int, int], Batch]
    examples: Callable[[int, IntArray], Batch]
    num_examples: Callable[[int], int]
    proxy: Batch
    evaluate: Callable[[], dict[str, float]]

    @property
    def partition(self) -> BlockPartition:
        """The model's blocks."""
        return model_partition(self.model)


def text_task(
    name: str,
    *,
    data_dir: Path | None,
    num_devices: int,
    seed: int,
    model_name: str = "minilm-l6",
    lr: float = 3e-4,
    train_examples: int | None = None,
    held_out: int | None = None,
) -> Task:
    """Load a task of the GLUE app, split evenly over devices.

    Parameters
    ----------
    name
        A task of GLUE, or the embedded one.
    data_dir
        Directory of GLUE's TSV files; None for the embedded task.
    num_devices
        Devices K.
    seed
        Seed of the split, the batches and the new head.
    model_name
        A model of `load_classifier`.
    lr
        Learning rate.
    train_examples
        How many of the training examples all devices have together, drawn by the seed
        (default: all).
    held_out
        How many of the held-out examples to judge by (default: all).
    """
    task, train, dev = load_task(
        name, "" if data_dir is None else str(data_dir), seed=seed
    )
    if train_examples is not None:
        order = rng_for(seed, "train-examples").permutation(len(train.labels))
        few = np.sort(order[:train_examples])
        sentences = tuple(train.sentences[index] for index in few)
        train = type(train)(sentences, train.labels[few])
    model, tokenizer = load_classifier(
        model_name,
        num_labels=task.num_labels,
        class_names=task.class_names,
        seed=seed,
    )
    parts = partition_examples(
        train.labels, num_devices, partitioning="iid", alpha=1.0, seed=seed
    )
    if held_out is not None:
        dev = type(dev)(dev.sentences[:held_out], dev.labels[:held_out])

    def examples(device: int, rows: IntArray) -> Batch:
        return make_batch(train, parts[device][rows], tokenizer, max_length=_MAX_LENGTH)

    def draw(device: int, server_round: int, batch_size: int) -> Batch:
        rng = rng_for(seed, "batch", server_round, f"device-{device:04d}")
        count = len(parts[device])
        return examples(device, rng.choice(count, min(batch_size, count), False))

    count = len(train.labels)
    proxy = rng_for(seed, "proxy").choice(count, min(64, count), replace=False)
    return Task(
        name=name,
        model=model,
        sequence_length=_MAX_LENGTH,
        lr=lr,
        draw=draw,
        examples=examples,
        num_examples=lambda device: len(parts[device]),
        proxy=make_batch(train, proxy, tokenizer, max_length=_MAX_LENGTH),
        evaluate=lambda: evaluate_model(model, tokenizer, task, dev, _MAX_LENGTH),
    )


def image_task(*, num_devices: int, seed: int, lr: float = 2e-3) -> Task:
    """Make the vision app's task: textures, and a ViT with random weights."""
    config = VisionConfig.from_run_config(
        {
            **_vision_defaults(),
            **_VIT,
            "rounds": 1,
            "batch-size": 1,
            "lr": lr,
            "seed": seed,
        }
    )
    train, held_out = load_images("", config.image_size, seed)
    build.cache_clear()  # it would hand out the model that the last run has trained
    model = build(config)[0]
    shuffled = rng_for(seed, "parts").permutation(len(train.labels))

    def examples(device: int, rows: IntArray) -> Batch:
        return train.batch(shuffled[device::num_devices][rows])

    def draw(device: int, server_round: int, batch_size: int) -> Batch:
        count = len(shuffled[device::num_devices])
        rng = rng_for(seed, "batch", server_round, device)
        return examples(device, rng.choice(count, min(batch_size, count), False))

    def evaluate() -> dict[str, float]:
        model.eval()
        classifier: Any = model
        with torch.inference_mode():
            output = classifier(**held_out.batch(np.arange(len(held_out.labels))))
        correct = output.logits.argmax(dim=1).numpy() == held_out.labels
        return {"accuracy": float(correct.mean()), "loss": output.loss.item()}

    return Task(
        name="textures",
        model=model,
        sequence_length=(config.image_size // PATCH_SIZE) ** 2 + 1,
        lr=lr,
        draw=draw,
        examples=examples,
        num_examples=lambda device: len(shuffled[device::num_devices]),
        proxy=train.batch(rng_for(seed, "proxy").choice(len(shuffled), 64, False)),
        evaluate=evaluate,
    )


def _vision_defaults() -> dict[str, Any]:
    app = Path(__file__).parents[1] / "vision" / "pyproject.toml"
    defaults: dict[str, Any] = tomllib.loads(app.read_text())["tool"]["flwr"]["app"][
        "config"
    ]
    return defaults
