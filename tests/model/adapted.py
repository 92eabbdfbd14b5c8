"""Tiny models with adapters: tuners and families."""

from __future__ import annotations

import torch
import transformers

from lola_flwr.model.adapter_blocks import model_partition
from lola_flwr.model.adapters import adapt
from tests.conftest import SMALL

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"]}
TUNERS = {
    "lora": ("lora", LORA),
    "lora-all-linear": ("lora", {"target_modules": "all-linear", "lora_bias": True}),
    "dora": ("lora", {**LORA, "use_dora": True}),
    "pissa": ("lora", {**LORA, "init_lora_weights": "pissa"}),
    "pissa-fast-svd": ("lora", {**LORA, "init_lora_weights": "pissa_niter_4"}),
    "pissa-dora-rs": (
        "lora",
        {
            **LORA,
            "init_lora_weights": "pissa",
            "use_dora": True,
            "use_rslora": True,
            "rank_pattern": {"value": 3},
            "alpha_pattern": {"query": 2},
        },
    ),
    "olora": ("lora", {**LORA, "init_lora_weights": "olora"}),
    "randlora": ("randlora", {"r": 4}),
    "vera": ("vera", {"r": 8}),
    "ia3": ("ia3", {}),
    "loha": ("LoHaConfig", {}),
    "lokr": ("lokr", {}),
    "oft": ("oft", {"oft_block_size": 8, "r": 0}),
    "boft": ("boft", {"boft_block_size": 4}),
    "fourierft": ("fourierft", {"n_frequency": 20}),
    "ln-tuning": ("ln_tuning", {}),
}


def small_roberta():
    torch.manual_seed(0)
    config = transformers.RobertaConfig(**SMALL, max_position_embeddings=40)
    return transformers.RobertaForSequenceClassification(config).eval()


def adapted_roberta(case, seed=3):
    tuning, options = TUNERS[case]
    model = adapt(small_roberta(), tuning, options, seed=seed)
    return model, model_partition(model)


def built(model_class, config):
    torch.manual_seed(0)
    return model_class(config).eval()


LAYERS = {"num_attention_heads": 2, "num_hidden_layers": 3}
FAMILIES = {
    "vit": lambda: built(
        transformers.ViTForImageClassification,
        transformers.ViTConfig(
            hidden_size=16, intermediate_size=32, image_size=8, patch_size=4, **LAYERS
        ),
    ),
    "gpt2": lambda: built(
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=60),
    ),
    "llama": lambda: built(
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(
            hidden_size=16,
            intermediate_size=32,
            num_key_value_heads=1,
            vocab_size=60,
            **LAYERS,
        ),
    ),
    "llama-classifier": lambda: built(
        transformers.LlamaForSequenceClassification,
        transformers.LlamaConfig(
            hidden_size=16, intermediate_size=32, vocab_size=60, **LAYERS
        ),
    ),
    "distilbert": lambda: built(
        transformers.DistilBertForSequenceClassification,
        transformers.DistilBertConfig(dim=16, hidden_dim=32, n_heads=2, n_layers=3),
    ),
    "t5": lambda: built(
        transformers.T5ForConditionalGeneration,
        transformers.T5Config(d_model=16, d_ff=32, d_kv=8, num_heads=2, num_layers=3),
    ),
}
