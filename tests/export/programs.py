"""Programs of small models, made once, and what they have to compute."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
import transformers

from lola_flwr.export.manifest import read_manifest
from lola_flwr.export.write import export_steps
from lola_flwr.model.adapters import adapt
from simulations.benchmarks import native_runner
from tests.conftest import SMALL
from tests.export.small import CLASSIFIER, classifier, exported, scratch

TOKENS = {
    name: torch.zeros(1, 10, dtype=torch.long)
    for name in ("input_ids", "attention_mask", "labels")
}


def bert():
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(**SMALL, max_position_embeddings=40)
    ).eval()


def llama(**options):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SMALL, num_key_value_heads=1, **options)
    ).eval()


def llama_lora():
    options = {"r": 4, "init_lora_weights": False}
    return adapt(llama(tie_word_embeddings=True), "lora", options)


MODELS = {
    "bert": (bert, CLASSIFIER),
    "roberta": (classifier, CLASSIFIER),
    "llama": (llama, TOKENS),
    "llama-lora": (llama_lora, TOKENS),
}


@cache
def programs(kind):
    """Export a small model, all depths; return it, the directory and the manifest."""
    make, example = MODELS[kind]
    of = exported(make(), example, name=kind)
    directory = scratch() / kind
    export_steps(of, directory)
    return of, directory, read_manifest(directory)


@cache
def built_runner():
    """Build the native runner; skip where that cannot be."""
    if reason := native_runner.why_not():
        pytest.skip(reason)
    return native_runner.built(scratch())


def built_device():
    """Build the native device; skip where that cannot be."""
    if reason := native_runner.why_no_device():
        pytest.skip(reason)
    return built_runner().with_name("lola-device")


def drawn(manifest, seed=1):
    """Return a batch with padding, in which labels are missing, and values."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 60, (6, 10), generator=generator)
    mask = torch.ones_like(ids)
    mask[4:, 7:] = 0
    labels = torch.randint(0, 2, (6,), generator=generator)
    of_tokens = torch.where(mask > 0, ids, -100)
    of_tokens[1, :5] = -100
    kinds = {"input_ids": ids, "attention_mask": mask}
    batch = {}
    for spec in manifest.batch:
        label = of_tokens if len(spec.shape) > 1 else labels
        batch[spec.name] = kinds.get(spec.name, label)
    return batch


def values_of(of):
    parameters = dict(of.model.named_parameters())
    return [parameters[n].detach().numpy().copy() for n in of.partition.trainable]


def assert_same(found, expected):
    """Compare to 1e-4 of each gradient, and the loss to 1e-5."""
    loss, *gradients = found
    assert float(loss) == pytest.approx(expected.loss, rel=1e-5)
    largest = max(float(g.abs().max()) for g in expected.gradients.values())
    for gradient, other in zip(gradients, expected.gradients.values(), strict=True):
        # A bias before a softmax has no gradient but rounding.
        scale = max(float(other.abs().max()), 1e-3 * largest)
        assert np.abs(gradient - other.numpy()).max() <= 1e-4 * scale
