"""Tiny models whose layers below a block run once, and batches for them."""

from __future__ import annotations

import pytest
import torch
import transformers

from lola_flwr.model.blocks import partition_parameters
from tests.conftest import SMALL


def partition_of(model):
    return partition_parameters(n for n, _ in model.named_parameters())


def text_batch(batch):
    return batch


def image_batch(_):
    torch.manual_seed(2)
    return {
        "pixel_values": torch.randn(6, 3, 8, 8),
        "labels": torch.tensor([0, 1, 1, 0, 1, 0]),
    }


def bert():
    config = transformers.BertConfig(**SMALL, max_position_embeddings=40)
    return transformers.BertForSequenceClassification(config)


def distilbert():
    config = transformers.DistilBertConfig(
        dim=16, hidden_dim=32, n_heads=2, n_layers=3, vocab_size=60
    )
    return transformers.DistilBertForSequenceClassification(config)


def deberta():
    config = transformers.DebertaV2Config(
        **SMALL,
        max_position_embeddings=40,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
    )
    return transformers.DebertaV2ForSequenceClassification(config)


def gpt2():
    config = transformers.GPT2Config(
        n_embd=16, n_head=2, n_layer=3, vocab_size=60, n_positions=40, pad_token_id=1
    )
    return transformers.GPT2ForSequenceClassification(config)


def llama():
    config = transformers.LlamaConfig(**SMALL, pad_token_id=1)
    return transformers.LlamaForSequenceClassification(config)


def vit():
    config = transformers.ViTConfig(
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        num_hidden_layers=3,
        image_size=8,
        patch_size=4,
    )
    return transformers.ViTForImageClassification(config)


FAMILIES = {
    "bert": (bert, text_batch),
    "distilbert": (distilbert, text_batch),
    "deberta": (deberta, text_batch),
    "gpt2": (gpt2, text_batch),
    "llama": (llama, text_batch),
    "vit": (vit, image_batch),
}


def assert_same(result, expected):
    assert result.loss == pytest.approx(expected.loss, rel=1e-5)
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(
            result.gradients[name], gradient, rtol=1e-4, atol=1e-7
        )
