"""A batch that is filled up has the loss and the gradients of the batch alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

from lola_flwr.errors import UserError
from lola_flwr.export.batches import fitted
from lola_flwr.model.backprop import block_gradient
from tests.conftest import SMALL
from tests.export.small import TorchRunner, classifier, copied, exported, written


@pytest.fixture
def of(tmp_path):
    return copied(tmp_path / "steps")


@pytest.fixture
def manifest(of):
    return of[1]


def arrays_of(batch, rows=None, columns=None):
    return {
        name: (t[:rows, :columns] if t.dim() > 1 else t[:rows]).numpy()
        for name, t in batch.items()
    }


def test_a_whole_batch_is_as_it_was(manifest, batch):
    given = arrays_of(batch)
    for spec, array in zip(manifest.batch, fitted(given, manifest), strict=True):
        np.testing.assert_array_equal(array, given[spec.name])


@pytest.mark.parametrize(("rows", "columns"), [(1, None), (5, None), (6, 3), (2, 7)])
def test_what_is_filled_up_changes_nothing(of, batch, rows, columns):
    exported_model, manifest = of
    model, partition = exported_model.model, exported_model.partition
    small = arrays_of(batch, rows, columns)
    whole = {n: torch.from_numpy(a) for n, a in small.items()}
    alone = block_gradient(model, partition, 1, whole)
    runner = TorchRunner(exported_model, manifest)
    parameters = dict(model.named_parameters())
    values = [parameters[n].detach().numpy().copy() for n in partition.trainable]
    loss, *found = runner.run(1, [*values, *fitted(small, manifest)])
    assert float(loss) == pytest.approx(alone.loss, rel=1e-6)
    for gradient, expected in zip(found, alone.gradients.values(), strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-7)


def test_what_may_not_be_filled_up_is_refused(manifest, batch):
    strict = replace(manifest, takes_fewer_examples=False, takes_fewer_tokens=False)
    fitted(arrays_of(batch), strict)
    with pytest.raises(UserError, match="give whole batches"):
        fitted(arrays_of(batch, rows=5), strict)
    with pytest.raises(UserError, match="9 tokens are shorter than the program's 10"):
        fitted(arrays_of(batch, columns=9), strict)


def test_other_batches_are_refused(manifest, batch):
    given = arrays_of(batch)
    without = {n: a for n, a in given.items() if n != "labels"}
    twice = {n: np.concatenate([a, a]) for n, a in given.items()}
    wide = {n: np.repeat(a, 2, axis=1) if a.ndim > 1 else a for n, a in given.items()}
    floats = {n: a.astype(float) for n, a in given.items()}
    uneven = {**given, "labels": given["labels"][:5]}
    for other in (without, {**given, "more": given["labels"]}):
        with pytest.raises(UserError, match="the program takes attention_mask, input"):
            fitted(other, manifest)
    for other in (twice, wide, floats, uneven, arrays_of(batch, rows=0)):
        with pytest.raises(UserError, match="or less"):
            fitted(other, manifest)


def test_a_loss_without_ignored_labels_takes_whole_batches(tmp_path, batch):
    regression = {**batch, "labels": batch["labels"].float()}
    model = classifier(num_labels=1)
    manifest = written(exported(model, regression), tmp_path / "steps")
    assert (manifest.takes_fewer_examples, manifest.takes_fewer_tokens) == (False, True)


def test_labels_of_tokens_are_filled_up_as_ignored(tmp_path):
    config = transformers.LlamaConfig(**SMALL, pad_token_id=3)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    tokens = torch.zeros(1, 10, dtype=torch.long)
    example = {"input_ids": tokens, "attention_mask": tokens, "labels": tokens}
    manifest = written(exported(model, example), tmp_path / "steps")
    assert manifest.takes_fewer_examples and manifest.takes_fewer_tokens
    given = {name: np.ones((2, 4), np.int64) for name in example}
    ids, mask, labels = fitted(given, manifest)
    assert ids[0].tolist() == [1] * 4 + [3] * 6
    assert mask[0].tolist() == [1] * 4 + [0] * 6
    assert labels[0].tolist() == [1] * 4 + [-100] * 6
    assert set(labels[2:].flatten()) == {-100}
    np.testing.assert_array_equal(ids[2:], np.repeat(ids[1:2], 4, axis=0))
