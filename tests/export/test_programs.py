"""Programs compute the gradients of ``block_gradient``, at every depth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from lola_flwr.cli.main import main
from lola_flwr.errors import UserError
from lola_flwr.export.bindings import BindingsRunner
from lola_flwr.export.lowering import refuse_operators
from lola_flwr.export.manifest import read_manifest
from lola_flwr.export.models import NamedModel, load_exported
from lola_flwr.export.write import export_steps
from lola_flwr.model.backprop import block_gradient
from tests.export.programs import MODELS, assert_same, drawn, programs, values_of
from tests.export.small import CLASSIFIER, classifier, exported

pytestmark = pytest.mark.slow
pytest.importorskip("executorch", reason="needs the extra [export]")


@pytest.mark.parametrize("kind", MODELS)
def test_gradients_are_those_of_block_gradient(kind):
    of, directory, manifest = programs(kind)
    runner = BindingsRunner(directory, manifest)
    batch = drawn(manifest)
    given = [*values_of(of), *(batch[spec.name].numpy() for spec in manifest.batch)]
    assert len(manifest.programs) == 3
    for program in manifest.programs:
        expected = block_gradient(of.model, of.partition, program.block, batch)
        assert_same(runner.run(program.block, given), expected)
        assert program.file.num_bytes < 200_000
        assert program.arena_bytes > 0


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["minilm-l6", "random:roberta-base"])
def test_so_are_those_of_models_of_real_size(name, tmp_path):
    of = load_exported(NamedModel(model=name), batch_size=4, sequence_length=16)
    manifest = export_steps(of, tmp_path / "steps")
    runner = BindingsRunner(tmp_path / "steps", manifest)
    generator = torch.Generator().manual_seed(0)
    batch = {s.name: torch.zeros(s.shape, dtype=torch.long) for s in manifest.batch}
    batch["input_ids"] = torch.randint(5, 30_000, (4, 16), generator=generator)
    batch["attention_mask"] += 1
    batch["labels"][1:3] = 1
    given = [*values_of(of), *(batch[spec.name].numpy() for spec in manifest.batch)]
    for block in range(of.partition.num_blocks):
        expected = block_gradient(of.model, of.partition, block, batch)
        assert_same(runner.run(block, given), expected)


def test_values_go_in_and_are_not_in_the_program():
    """What other devices trained changes the loss, whichever block is trained."""
    of, directory, manifest = programs("bert")
    runner = BindingsRunner(directory, manifest)
    batch = [t.numpy() for t in drawn(manifest).values()]
    values = values_of(of)
    before, *_ = runner.run(2, [*values, *batch])
    rng = np.random.default_rng(0)
    for place, name in enumerate(of.partition.trainable):
        if not name.endswith("dense.weight"):
            continue
        moved = [*values]
        moved[place] = rng.standard_normal(moved[place].shape).astype(np.float32)
        after, *_ = runner.run(2, [*moved, *batch])
        assert abs(float(after) - float(before)) > 1e-5, name


def test_all_depths_share_the_frozen_weights():
    _, directory, manifest = programs("llama-lora")
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
    model = classifier()
    for block in model.roberta.encoder.layer:
        dense = block.output.dense
        block.output.dense = torch.nn.Sequential(dense, layer())
    of = exported(model, CLASSIFIER)
    with pytest.raises(UserError, match=said) as refused:
        export_steps(of, tmp_path / "out", blocks=[2])
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_an_operator_without_a_kernel_is_named():
    refuse_operators(["aten::add.out", "aten::mm.out"], "Block 1")
    with pytest.raises(
        UserError, match=r"Block 1 uses aten::linalg_inv_ex\.inverse, for which"
    ):
        refuse_operators(["aten::add.out", "aten::linalg_inv_ex.inverse"], "Block 1")


def test_what_is_no_block_or_no_float32_is_refused(tmp_path):
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
    manifest = read_manifest(out)
    assert [program.block for program in manifest.programs] == [3]
    assert manifest.batch[0].shape == (2, 8)
    assert main([*command, "--out", str(out)]) == 1
