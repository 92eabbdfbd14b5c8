"""An export without ExecuTorch: a manifest of a small model, and PyTorch behind it."""

from __future__ import annotations

import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch
import transformers

from lola_flwr.costs.of_model import model_costs
from lola_flwr.export.describe import (
    ExportedModel,
    described,
    example_batch,
    program_spec,
)
from lola_flwr.export.manifest import file_spec, read_manifest, write_manifest
from lola_flwr.model.adapter_blocks import model_partition
from lola_flwr.model.backprop import block_gradient
from lola_flwr.model.loading import load_values
from tests.conftest import SMALL

CLASSIFIER = {
    "input_ids": torch.zeros(1, 10, dtype=torch.long),
    "attention_mask": torch.ones(1, 10, dtype=torch.long),
    "labels": torch.zeros(1, dtype=torch.long),
}


def classifier(**options):
    """Return a small classifier without dropout."""
    torch.manual_seed(0)
    return transformers.RobertaForSequenceClassification(
        transformers.RobertaConfig(
            **SMALL,
            max_position_embeddings=40,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            **options,
        )
    ).eval()


_SCRATCH = []


def scratch():
    """Make a directory that goes with this process."""
    _SCRATCH.append(tempfile.TemporaryDirectory())
    return Path(_SCRATCH[-1].name)


@cache
def small():
    """Return the small export that tests share, and its directory."""
    of = exported(classifier(), CLASSIFIER)
    directory = scratch() / "steps"
    written(of, directory)
    return of, directory


def copied(directory):
    """Copy the small export into a directory; return what was exported, and both."""
    of, made = small()
    shutil.copytree(made, directory)
    return of, read_manifest(directory)


def exported(model, example, *, batch_size=6, sequence_length=10, name="small"):
    """Return what is exported of a model."""
    partition = model_partition(model)
    example = {key: values[:1] for key, values in example.items()}
    return ExportedModel(
        name=name,
        model=model,
        partition=partition,
        example=example,
        batch_size=batch_size,
        sequence_length=sequence_length,
        costs=model_costs(
            model,
            partition,
            batch_size=batch_size,
            sequence_length=sequence_length,
            example=example,
        ),
    )


def written(of, directory):
    """Write files that are no programs, and the manifest that describes them."""
    directory.mkdir()
    files = {}
    for name in ("frozen.ptd", *(f"block-{i}.pte" for i in range(len(of.costs.flops)))):
        (directory / name).write_bytes(name.encode())
        files[name] = file_spec(directory / name)
    manifest = described(
        of,
        example_batch(of),
        runtime="none",
        frozen=files["frozen.ptd"],
        programs=[
            program_spec(of, block, files[f"block-{block}.pte"], arena_bytes=1)
            for block in range(of.partition.num_blocks)
        ],
    )
    write_manifest(directory, manifest)
    return manifest


class TorchRunner:
    """Computes with PyTorch what a program computes, in evaluation mode."""

    peak_memory_bytes = 123.0

    def __init__(self, of, manifest):
        self._of = of
        self._manifest = manifest

    def run(self, block, inputs):
        names = self._of.partition.trainable
        load_values(self._of.model, names, inputs[: len(names)])
        arrays = inputs[len(names) :]
        specs = self._manifest.batch
        assert [(a.shape, a.dtype.str) for a in arrays] == [
            (spec.shape, spec.dtype) for spec in specs
        ]
        found = block_gradient(
            self._of.model.eval(),
            self._of.partition,
            block,
            {s.name: torch.from_numpy(a) for s, a in zip(specs, arrays, strict=True)},
            loss_function=self._of.loss_function,
        )
        loss = torch.tensor(found.loss).numpy()
        return [loss, *(g.numpy(force=True) for g in found.gradients.values())]
