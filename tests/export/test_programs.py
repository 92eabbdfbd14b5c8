"""Programs compute the gradients of ``block_gradient``: every depth of small models."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from lola_flwr.cli.main import main
from lola_flwr.errors import UserError
from lola_flwr.export.manifest import read_manifest
from lola_flwr.model.adapters import adapt
from lola_flwr.model.backprop import block_gradient
from tests.conftest import SMALL
from tests.export.small import CLASSIFIER, classifier, exported

pytestmark = pytest.mark.slow
pytest.importorskip("executorch", reason="needs the extra [export]")

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
def programs(kind, root):
    """Export a small model, all depths; return it, the directory and the manifest."""
    from lola_flwr.export.write import export_steps

    make, example = MODELS[kind]
    of = exported(make(), example, name=kind)
    export_steps(of, root / kind)
    return of, root / kind, read_manifest(root / kind)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("programs")


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


@pytest.mark.parametrize("kind", MODELS)
def test_gradients_are_those_of_block_gradient(kind, root):
    from lola_flwr.export.bindings import BindingsRunner

    of, directory, manifest = programs(kind, root)
    runner = BindingsRunner(directory, manifest)
    batch = drawn(manifest)
    given = [*values_of(of), *(batch[spec.name].numpy() for spec in manifest.batch)]
    assert len(manifest.programs) == 3
    for program in manifest.programs:
        expected = block_gradient(of.model, of.partition, program.block, batch)
        assert_same(runner.run(program.block, given), expected)
        assert program.file.num_bytes < 200_000
        assert program.arena_bytes > 0


def test_values_go_in_and_are_not_in_the_program(root):
    """What other devices trained changes the loss, whichever block is trained."""
    from lola_flwr.export.bindings import BindingsRunner

    of, directory, manifest = programs("bert", root)
    runner = BindingsRunner(directory, manifest)
    batch = [t.numpy() for t in drawn(manifest).values()]
    values = values_of(of)
    before, *_ = runner.run(2, [*values, *batch])
    for place, name in enumerate(of.partition.trainable):
        if not name.endswith("dense.weight"):
            continue
        moved = [v + 0.1 * (i == place) for i, v in enumerate(values)]
        after, *_ = runner.run(2, [*(m.astype(np.float32) for m in moved), *batch])
        assert abs(float(after) - float(before)) > 1e-7, name


def test_all_depths_share_the_frozen_weights(root):
    _, directory, manifest = programs("llama-lora", root)
    files = {path.name for path in directory.iterdir()}
    assert files == {
        "frozen.ptd",
        "manifest.json",
        *(f"block-{block}.pte" for block in range(3)),
    }
    frozen = sum(
        p.nbytes
        for n, p in MODELS["llama-lora"][0]().named_parameters()
        if n not in manifest.partition.trainable
    )
    assert frozen <= manifest.frozen.num_bytes < 1.1 * frozen + 20_000


class Inverse(torch.nn.Module):
    """A layer whose operator no runtime has a kernel for."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.eye(16))

    def forward(self, hidden):
        return hidden @ torch.linalg.inv(self.weight)


class Chooses(torch.nn.Module):
    """A layer whose code depends on values."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(16))

    def forward(self, hidden):
        return hidden * self.weight if hidden.sum() > 0 else hidden


@pytest.mark.parametrize(
    ("layer", "said"), [(Inverse, r"aten[:.]+\w*inv\w*"), (Chooses, "cannot be traced")]
)
def test_what_cannot_be_a_program_is_refused_in_a_line(tmp_path, layer, said):
    from lola_flwr.export.write import export_steps

    model = classifier()
    for block in model.roberta.encoder.layer:
        dense = block.output.dense
        block.output.dense = torch.nn.Sequential(dense, layer())
    of = exported(model, CLASSIFIER)
    with pytest.raises(UserError, match=said) as refused:
        export_steps(of, tmp_path / "out", blocks=[2])
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_block_or_no_float32_is_refused(tmp_path):
    from lola_flwr.export.write import export_steps

    of = exported(classifier(), CLASSIFIER)
    with pytest.raises(UserError, match="has blocks 0 to 2, no 3"):
        export_steps(of, tmp_path / "out", blocks=[3])
    half = replace(of, model=classifier().bfloat16())
    with pytest.raises(UserError, match="bfloat16, and values travel as float32"):
        export_steps(half, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_command_exports_a_model(tmp_path, capsys):
    arguments = ["--model", "random:roberta-tiny", "--max-length", "8"]
    out = tmp_path / "steps"
    command = ["export", *arguments, "--batch-size", "2", "--blocks", "3"]
    assert main([*command, "--out", str(out)]) == 0
    assert "block-3.pte" in capsys.readouterr().out
    manifest = read_manifest(Path(out))
    assert [program.block for program in manifest.programs] == [3]
    assert manifest.batch[0].shape == (2, 8)
    assert main([*command, "--out", str(out)]) == 1
