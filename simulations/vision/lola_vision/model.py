"""The model that the run configuration describes, and the images."""

from __future__ import annotations

from functools import lru_cache

import torch
from transformers import ViTConfig, ViTForImageClassification

from lola_flwr.build import Channel, RoundSettings, ServerStep, coordinator_for
from lola_flwr.costs.estimated import BlockCosts
from lola_flwr.costs.of_model import model_costs
from lola_flwr.errors import UserError
from lola_flwr.model.adapter_blocks import model_partition
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.server.coordinator import Coordinator
from lola_vision.config import NUM_HEADS, VisionConfig
from lola_vision.images import Images, load_images


# A worker process serves many simulated devices: they share model and images.
@lru_cache(maxsize=1)
def images(config: VisionConfig) -> tuple[Images, Images]:
    """Return the configured training and held-out images."""
    return load_images(config.data_dir, config.image_size, config.seed)


@lru_cache(maxsize=1)
def build(
    config: VisionConfig,
) -> tuple[ViTForImageClassification, BlockPartition, BlockCosts]:
    """Return the model with its initial weights, its blocks, and what these cost."""
    if config.image_size % config.patch_size:
        raise UserError(
            f"image-size={config.image_size} is no multiple of "
            f"patch-size={config.patch_size}."
        )
    train, _ = images(config)
    vit = ViTConfig(
        image_size=config.image_size,
        patch_size=config.patch_size,
        hidden_size=config.hidden_size,
        intermediate_size=2 * config.hidden_size,
        num_hidden_layers=config.layers,
        num_attention_heads=NUM_HEADS,
        id2label=dict(enumerate(train.classes)),
        label2id={name: index for index, name in enumerate(train.classes)},
        problem_type="single_label_classification",
        # The embeddings stay as they are drawn: wide enough to tell patches apart.
        initializer_range=0.1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        model = ViTForImageClassification(vit)
    partition = model_partition(model)
    num_patches = (config.image_size // config.patch_size) ** 2
    costs = model_costs(
        model,
        partition,
        batch_size=config.batch_size,
        sequence_length=num_patches + 1,  # the patches and the class token
    )
    return model, partition, costs


def make_coordinator(config: VisionConfig) -> Coordinator:
    """Return what decides and steps on the server."""
    model, partition, costs = build(config)
    return coordinator_for(
        model,
        partition,
        costs=costs,
        batch_size=config.batch_size,
        step=ServerStep(lr=config.lr, linear_decay_steps=config.rounds),
        settings=RoundSettings(
            channel=Channel(bandwidth_hz=config.bandwidth_hz), seed=config.seed
        ),
    )
