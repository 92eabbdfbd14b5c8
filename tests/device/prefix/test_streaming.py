from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
import transformers

from lola_flwr.device.prefix import (
    ActivationCache,
    LayeredWeights,
    StreamedModel,
    save_base,
    skeleton_of,
)
from lola_flwr.errors import UserError
from lola_flwr.model.backprop import block_gradient
from lola_flwr.model.blocks import partition_parameters
from lola_flwr.model.loading import fingerprint
from lola_flwr.model.recompute import recomputed_suffix
from tests.conftest import SMALL
from tests.device.prefix.families import FAMILIES, assert_same, bert, partition_of


def streamed(make, model, tmp_path, save=save_base):
    save(model, tmp_path / "base")
    weights = LayeredWeights(tmp_path / "base", tmp_path / "changed")
    skeleton = skeleton_of(make)
    return StreamedModel(skeleton, partition_of(skeleton), weights)


def resident(model):
    """Names of the parameters that have values."""
    return {name for name, p in model.named_parameters() if not p.is_meta}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("block_index", [0, 1, 2])
def test_gradient_is_the_plain_one(family, block_index, batch, tmp_path):
    make, make_batch = FAMILIES[family]
    torch.manual_seed(0)
    model, batch = make().eval(), make_batch(batch)
    partition = partition_of(model)
    expected = block_gradient(model, partition, block_index, batch)
    held = streamed(make, model, tmp_path)
    assert held.partition == partition
    assert held.fingerprint() == fingerprint(model, partition.frozen)
    cache = ActivationCache(10**6)
    for options in ({}, {"cache": cache}, {"cache": cache}, {"stream": False}):
        with held.at_block(block_index, **options) as streaming:
            result = block_gradient(streaming, partition, block_index, batch)
        assert_same(result, expected)
        assert not resident(held.model)
    assert cache.hits == (6 if block_index else 0)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("block_index", [0, 1, 2])
def test_layers_from_the_block_on_may_run_twice(family, block_index, batch, tmp_path):
    make, make_batch = FAMILIES[family]
    torch.manual_seed(0)
    model, batch = make().train(), make_batch(batch)
    held = streamed(make, model, tmp_path)
    step = partial(block_gradient, partition=held.partition, blocks=block_index)
    cache = ActivationCache(10**6)
    for options in ({}, {"cache": cache}, {"cache": cache}):
        with held.at_block(block_index, **options) as streaming:
            streaming.train()
            torch.manual_seed(1)
            once = step(streaming, batch=batch, micro_batch_size=4)
            torch.manual_seed(1)
            with recomputed_suffix(streaming, held.partition, block_index):
                twice = step(streaming, batch=batch, micro_batch_size=4)
        assert_same(twice, once)


@pytest.mark.parametrize(
    "blocks", [(1, 2), pytest.param((0, 1), marks=pytest.mark.slow)]
)
def test_several_blocks_have_their_plain_gradient(blocks, batch, tmp_path):
    torch.manual_seed(0)
    model = bert().eval()
    held = streamed(bert, model, tmp_path)
    expected = block_gradient(model, held.partition, blocks, batch)
    cache = ActivationCache(10**6)
    for options in ({}, {"cache": cache}, {"cache": cache}):
        with held.at_block(blocks[0], **options) as streaming:
            result = block_gradient(streaming, held.partition, blocks, batch)
        assert_same(result, expected)
    assert cache.hits == (6 if blocks[0] else 0)


def test_layers_below_are_in_memory_one_at_a_time(batch, tmp_path):
    torch.manual_seed(0)
    held = streamed(bert, bert(), tmp_path)
    below = [name for block in held.partition.blocks[:2] for name in block]
    seen = []
    for index, layer in enumerate(held.model.bert.encoder.layer):
        layer.attention.register_forward_hook(
            lambda *_, index=index: seen.append(
                (index, resident(held.model).intersection(below))
            )
        )
    with held.at_block(2) as model:
        assert resident(model).isdisjoint(below)
        block_gradient(model, held.partition, 2, batch)
    assert seen == [
        (0, set(held.partition.blocks[0])),
        (1, set(held.partition.blocks[1])),
        (2, set()),
    ]


def test_blocks_that_changed_lie_over_the_base(batch, tmp_path):
    torch.manual_seed(0)
    model = bert().eval()
    held = streamed(bert, model, tmp_path)
    cache = ActivationCache(10**6)
    rng = np.random.default_rng(0)
    for changed in (held.partition.blocks[0], held.partition.head[:1]):
        values = {}
        for name in changed:
            shape = tuple(model.get_parameter(name).shape)
            values[name] = rng.normal(0, 0.1, shape).astype(np.float32)
            model.get_parameter(name).data = torch.from_numpy(values[name])
        held.load([*values], [*values.values()])
        expected = block_gradient(model, held.partition, 2, batch)
        with held.at_block(2, cache) as streaming:
            assert_same(block_gradient(streaming, held.partition, 2, batch), expected)
    # The second change was above the block: nothing below ran again.
    assert cache.hits == 6
    # Another process finds the same; the base was left as it was.
    weights = LayeredWeights(tmp_path / "base", tmp_path / "changed")
    again = StreamedModel(skeleton_of(bert), held.partition, weights)
    with again.at_block(1) as streaming:
        result = block_gradient(streaming, held.partition, 1, batch)
    assert_same(result, block_gradient(model, held.partition, 1, batch))


def test_a_base_of_the_bare_model_and_of_another_precision(batch, tmp_path):
    torch.manual_seed(0)
    model = bert().eval()
    half = model.bert.to(torch.float16)
    held = streamed(bert, half, tmp_path, transformers.BertModel.save_pretrained)
    model = model.float()
    head = [model.get_parameter(n).numpy(force=True) for n in held.partition.head]
    with pytest.raises(UserError, match=r"classifier\.\w+ is neither in the base"):
        held.at_block(1).__enter__()
    held.load(held.partition.head, head)
    assert held.fingerprint() == fingerprint(model, held.partition.frozen)
    with held.at_block(1) as streaming:
        result = block_gradient(streaming, held.partition, 1, batch)
    assert_same(result, block_gradient(model, held.partition, 1, batch))


def test_a_base_in_several_files(batch, tmp_path):
    torch.manual_seed(0)
    model = bert().eval()
    in_pieces = partial(transformers.BertModel.save_pretrained, max_shard_size="5KB")
    held = streamed(bert, model, tmp_path, in_pieces)
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    with held.at_block(1) as streaming:
        result = block_gradient(streaming, held.partition, 1, batch)
    assert_same(result, block_gradient(model, held.partition, 1, batch))


def test_tied_weights_stay_tied(batch, tmp_path):
    def make():
        config = transformers.GPT2Config(
            n_embd=16, n_head=2, n_layer=3, vocab_size=60, n_positions=40
        )
        return transformers.GPT2LMHeadModel(config)

    torch.manual_seed(0)
    model = make().eval()
    held = streamed(make, model, tmp_path)
    batch = {"input_ids": batch["input_ids"], "labels": batch["input_ids"]}
    with held.at_block(2) as streaming:
        result = block_gradient(streaming, held.partition, 2, batch)
    assert_same(result, block_gradient(model, held.partition, 2, batch))


def test_what_does_not_fit_is_refused(tmp_path):
    held = streamed(bert, bert(), tmp_path)
    name = held.partition.blocks[0][0]
    with pytest.raises(UserError, match=r"has shape \(16, 16\) here but \(2, 2\)"):
        held.load([name], [np.zeros((2, 2), np.float32)])
    with pytest.raises(UserError, match="0 arrays received"):
        held.load([name], [])
    assert not list((tmp_path / "changed").iterdir())
    (tmp_path / "base" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        LayeredWeights(tmp_path / "base", tmp_path / "changed")
    with pytest.raises(UserError, match="cannot be read"):
        LayeredWeights(tmp_path / "nothing", tmp_path / "changed")


def test_another_models_base_is_refused(tmp_path):
    roberta = transformers.RobertaConfig(**SMALL, max_position_embeddings=40)
    transformers.RobertaForMaskedLM(roberta).save_pretrained(tmp_path / "base")
    weights = LayeredWeights(tmp_path / "base", tmp_path / "changed")
    skeleton = skeleton_of(bert)
    names = [name for name, _ in skeleton.named_parameters()]
    with pytest.raises(UserError, match=r"lacks bert\.embeddings\..*save_base"):
        StreamedModel(skeleton, partition_parameters(names), weights)
