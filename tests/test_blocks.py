from __future__ import annotations

import pytest
import transformers as hf

from lola_flwr.blocks import BlocksNotFound, partition_parameters
from tests.conftest import SMALL

# Architecture -> (configuration, classifier, stack, first names of head parameters).
FAMILIES = {
    "roberta": (
        hf.RobertaConfig(**SMALL),
        hf.RobertaForSequenceClassification,
        "roberta.encoder.layer",
        {"classifier.dense", "classifier.out_proj"},
    ),
    "bert": (
        hf.BertConfig(**SMALL),
        hf.BertForSequenceClassification,
        "bert.encoder.layer",
        {"bert.pooler.dense", "classifier"},
    ),
    "distilbert": (
        hf.DistilBertConfig(
            dim=16, hidden_dim=32, n_heads=2, n_layers=3, vocab_size=60
        ),
        hf.DistilBertForSequenceClassification,
        "distilbert.transformer.layer",
        {"pre_classifier", "classifier"},
    ),
    "deberta-v2": (
        hf.DebertaV2Config(
            **SMALL,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            position_buckets=8,
            norm_rel_ebd="layer_norm",
        ),
        hf.DebertaV2ForSequenceClassification,
        "deberta.encoder.layer",
        {"pooler.dense", "classifier"},
    ),
    "gpt2": (
        hf.GPT2Config(
            n_embd=16,
            n_head=2,
            n_layer=3,
            vocab_size=60,
            bos_token_id=0,
            eos_token_id=0,
        ),
        hf.GPT2ForSequenceClassification,
        "transformer.h",
        {"transformer.ln_f", "score"},
    ),
    "llama": (
        hf.LlamaConfig(**SMALL, num_key_value_heads=1),
        hf.LlamaForSequenceClassification,
        "model.layers",
        {"model.norm", "score"},
    ),
    "vit": (
        hf.ViTConfig(
            **{k: v for k, v in SMALL.items() if k != "vocab_size"},
            image_size=32,
            patch_size=16,
        ),
        hf.ViTForImageClassification,
        None,
        {"vit.layernorm", "classifier"},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_partition_of_a_hugging_face_model(family):
    config, classifier, stack, head_modules = FAMILIES[family]
    names = [name for name, _ in classifier(config).named_parameters()]

    partition = partition_parameters(names)

    assert partition.num_blocks == 3
    for index, block in enumerate(partition.blocks):
        if stack is not None:
            assert all(name.startswith(f"{stack}.{index}.") for name in block)
        assert len(block) == len(partition.blocks[0])
    assert {name.rsplit(".", 1)[0] for name in partition.head} == head_modules
    divided = [*partition.trainable, *partition.frozen]
    assert sorted(divided) == sorted(names)
    assert any("embed" in name or "wte" in name for name in partition.frozen)


def test_depth_counts_from_the_output():
    partition = partition_parameters(["e", "l.0.w", "l.1.w", "l.2.w", "head"])
    assert [partition.depth(index) for index in range(3)] == [3, 2, 1]
    assert partition.update_names(2) == ("l.2.w", "head")


def test_merged_partition_is_the_whole_stack():
    merged = partition_parameters(["e", "l.0.w", "l.1.w", "head"]).merged()
    assert merged.blocks == (("l.0.w", "l.1.w"),)
    assert (merged.head, merged.frozen) == (("head",), ("e",))


def test_numbers_inside_a_layer_stay_inside_it():
    names = [f"net.{i}.experts.{e}.w" for i in range(2) for e in range(5)]
    assert partition_parameters(names).num_blocks == 2


def test_shared_layers_are_refused():
    config = hf.AlbertConfig(**SMALL)
    names = [
        n for n, _ in hf.AlbertForSequenceClassification(config).named_parameters()
    ]
    with pytest.raises(BlocksNotFound, match="No stack of at least two equal layers"):
        partition_parameters(names)


def test_equal_stacks_are_not_guessed_between():
    config = hf.T5Config(d_model=16, d_ff=32, d_kv=8, num_heads=2, num_layers=2)
    names = [n for n, _ in hf.T5ForConditionalGeneration(config).named_parameters()]
    with pytest.raises(BlocksNotFound, match=r"encoder\.block, decoder\.block"):
        partition_parameters(names)
    chosen = partition_parameters(names, stack="decoder.block")
    assert chosen.num_blocks == 2
    assert all("relative_attention_bias" not in name for name in chosen.trainable)


@pytest.mark.parametrize(
    ("names", "stack", "message"),
    [
        ([], None, "no parameters at all"),
        (["l.0.w", "l.2.w"], None, r"numbered \[0, 2\]; expected 0 to 1"),
        (["l.0.w", "l.1.w"], "m", "the stacks found are: l"),
    ],
)
def test_errors_name_what_was_not_understood(names, stack, message):
    with pytest.raises(BlocksNotFound, match=message):
        partition_parameters(names, stack=stack)
