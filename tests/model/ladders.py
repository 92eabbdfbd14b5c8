"""Tiny models of several families, and side networks beside them."""

from __future__ import annotations

import torch
import transformers

from lola_flwr.model.adapter_blocks import model_partition
from lola_flwr.model.adapters import adapt
from lola_flwr.model.example import example_of

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
# Heads of 8 features; two of keys and values.
LLAMA = {**SIZES, "num_key_value_heads": 2, "pad_token_id": 0}
GPT2 = {"vocab_size": 60, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
DISTILBERT = {"vocab_size": 60, "dim": 32, "n_layers": 3, "n_heads": 4}
FAMILIES = {
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", SIZES),
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "bert": ("BertForSequenceClassification", "BertConfig", SIZES),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {**DISTILBERT, "hidden_dim": 64},
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", LLAMA),
    "llama-classifier": ("LlamaForSequenceClassification", "LlamaConfig", LLAMA),
    "vit": (
        "ViTForImageClassification",
        "ViTConfig",
        {**SIZES, "image_size": 32, "patch_size": 16},
    ),
}


def plain(family="roberta"):
    model, config, sizes = FAMILIES[family]
    torch.manual_seed(0)
    made = getattr(transformers, config)(**sizes)
    return getattr(transformers, model)(made).eval()


def with_ladder(family="roberta", seed=0, **options):
    return adapt(plain(family), "ladder", {"r": 4, **options}, seed=seed)


def moved(model):
    """Move what is trained to where every value of it matters."""
    torch.manual_seed(5)
    with torch.no_grad():
        for name in model_partition(model).trainable:
            values = model.get_parameter(name)
            values.add_(0.1 * torch.randn_like(values))
    return model


def examples(model, count=4, num_tokens=7):
    batch = example_of(model, count, num_tokens=num_tokens)
    is_lm = "LM" in type(model).__name__
    labels = batch["input_ids"].clone() if is_lm else torch.arange(count) % 2
    return {**batch, "labels": labels}
