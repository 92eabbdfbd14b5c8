"""Tiny models in subnetworks, with batches, and what full back-propagation gives."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import transformers

from lola_flwr.d2ft.find import find_subnetworks
from lola_flwr.d2ft.operations import Operation
from lola_flwr.d2ft.training import scheduled_gradient, split_batch
from lola_flwr.model.backprop import BatchWeight, block_gradient, num_examples_of
from lola_flwr.model.blocks import partition_parameters
from tests.conftest import SMALL

SKIP, FORWARD, FULL = Operation.SKIP, Operation.FORWARD, Operation.FULL
SIZES = {**SMALL, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}


def text_batch():
    generator = torch.Generator().manual_seed(1)
    attention_mask = torch.ones(6, 10, dtype=torch.long)
    attention_mask[4:, 7:] = 0
    return {
        "input_ids": torch.randint(5, 60, (6, 10), generator=generator),
        "attention_mask": attention_mask,
        "labels": torch.tensor([0, 1, 1, 0, 1, 0]),
    }


def image_batch():
    generator = torch.Generator().manual_seed(1)
    return {
        "pixel_values": torch.randn(6, 3, 16, 16, generator=generator),
        "labels": torch.tensor([0, 1, 1, 0, 1, 0]),
    }


@dataclass
class Case:
    model: torch.nn.Module
    batch: dict[str, torch.Tensor]
    batch_weight: BatchWeight = num_examples_of

    def __post_init__(self):
        trained = [n for n, p in self.model.named_parameters() if p.requires_grad]
        self.partition = partition_parameters(trained)
        self.subnetworks = find_subnetworks(self.model, self.partition)
        self.trainable = self.partition.trainable

    def table(self, operation):
        return [[operation] * 4 for _ in range(3)]

    def run(self, operations, num_parts=1):
        operations = np.array(operations).reshape(12, 1).repeat(num_parts, axis=1)
        parts = split_batch(self.batch, num_parts)
        return scheduled_gradient(
            self.model,
            self.subnetworks,
            self.trainable,
            parts,
            operations,
            batch_weight=self.batch_weight,
        )


WORDS = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def llama():
    """Make one whose query heads share keys and values, two by two."""
    sizes = {**SIZES, **WORDS, "num_attention_heads": 8, "num_key_value_heads": 4}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, tie_word_embeddings=True)
    )


def modernbert():
    """Make one with local and global layers, the first of which lacks a norm."""
    config = transformers.ModernBertConfig(
        **SIZES | WORDS,
        cls_token_id=3,
        sep_token_id=4,
        local_attention=4,
        global_attn_every_n_layers=2,
    )
    return transformers.ModernBertForSequenceClassification(config)


def gpt2_with_adapters():
    """Make one with one map for queries, keys and values, all maps transposed."""
    peft = pytest.importorskip("peft")
    config = transformers.GPT2Config(
        n_embd=32, n_layer=3, n_head=4, n_positions=40, **WORDS
    )
    lora = peft.LoraConfig(
        task_type="SEQ_CLS",
        r=2,
        target_modules=["c_attn", "c_proj", "c_fc"],
        init_lora_weights=False,
        fan_in_fan_out=True,
    )
    model = transformers.GPT2ForSequenceClassification(config)
    return peft.get_peft_model(model, lora)


def num_learned(batch):
    return int((batch["labels"][:, 1:] != -100).sum())


def language_batch():
    batch = text_batch()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return {**batch, "labels": labels}


def make(family):
    torch.manual_seed(0)
    if family == "llama":
        return Case(llama().eval(), language_batch(), num_learned)
    if family == "modernbert":
        return Case(modernbert().eval(), text_batch())
    if family == "gpt2-lora":
        return Case(gpt2_with_adapters().eval(), text_batch())
    if family == "vit":
        config = transformers.ViTConfig(
            **{k: v for k, v in SIZES.items() if k != "vocab_size"},
            image_size=16,
            patch_size=4,
        )
        return Case(
            transformers.ViTForImageClassification(config).eval(), image_batch()
        )
    if family == "distilbert":
        config = transformers.DistilBertConfig(
            vocab_size=60, dim=32, hidden_dim=64, n_heads=4, n_layers=3
        )
        model = transformers.DistilBertForSequenceClassification(config)
        return Case(model.eval(), text_batch())
    config = transformers.RobertaConfig(**SIZES, max_position_embeddings=40)
    model = transformers.RobertaForSequenceClassification(config).eval()
    if family == "roberta-lora":
        peft = pytest.importorskip("peft")
        lora = peft.LoraConfig(
            task_type="SEQ_CLS",
            r=2,
            target_modules=["query", "value", "dense"],
            # Adapters that do nothing would have no gradient of their first factor.
            init_lora_weights=False,
        )
        model = peft.get_peft_model(model, lora).eval()
    return Case(model, text_batch())


FAMILIES = ["roberta", "roberta-lora", "distilbert", "vit"]
FAMILIES += ["llama", "modernbert", "gpt2-lora"]


def exact_gradient(case):
    return block_gradient(
        case.model,
        case.partition.merged(),
        0,
        case.batch,
        batch_weight=case.batch_weight,
    )
