"""Small models of the families that are pruned, and what pruning is compared with."""

from __future__ import annotations

import copy

import torch
import transformers as hf

from lola_flwr.d2ft.cuts import cuts_of
from lola_flwr.d2ft.pruned import prune
from lola_flwr.d2ft.pruning import Pruning
from lola_flwr.model.adapter_blocks import model_partition
from lola_flwr.model.example import example_of

_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "max_position_embeddings": 40,
}
_ENCODER = {**_SIZES, "vocab_size": 60, "pad_token_id": 0}
_WORDS = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GPT2 = {"n_embd": 32, "n_inner": 64, "n_layer": 2, "n_head": 4, "n_positions": 40}
_DECODER = {**_SIZES, **_WORDS, "num_attention_heads": 8, "num_key_value_heads": 4}
_MODERN = {"cls_token_id": 3, "sep_token_id": 4, "local_attention": 4}

FAMILIES = {
    "roberta": lambda: hf.RobertaForSequenceClassification(
        hf.RobertaConfig(**_ENCODER)
    ),
    # Two query heads share those of a key.
    "llama": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(**_DECODER, tie_word_embeddings=True)
    ),
    # One map for queries, keys and values, all maps transposed.
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**_GPT2, **_WORDS)),
    # One map for both that gate each other.
    "modernbert": lambda: hf.ModernBertForSequenceClassification(
        hf.ModernBertConfig(**_ENCODER, **_MODERN, global_attn_every_n_layers=2)
    ),
    "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**_ENCODER)),
    "distilbert": lambda: hf.DistilBertForSequenceClassification(
        hf.DistilBertConfig(vocab_size=60, dim=32, hidden_dim=64, n_heads=4, n_layers=2)
    ),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_DECODER)),
    # Normalises queries and keys.
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_DECODER, head_dim=8)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_DECODER)),
    "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**_DECODER, head_dim=8)),
    "vit": lambda: hf.ViTForImageClassification(
        hf.ViTConfig(**_SIZES, image_size=16, patch_size=4)
    ),
}


def built(family):
    """Return a model at weights that are no initial ones."""
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    moved(model.parameters(), 0.2)
    return model


def moved(parameters, step=0.05):
    """Move parameters to where what is lost shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for values in parameters:
            values += step * torch.randn(values.shape, generator=generator)


def batch_of(model):
    """Return three examples, one of them padded, with labels."""
    batch = example_of(model, 3, num_tokens=9)
    tokens = batch.get("input_ids")
    if tokens is None:
        return batch
    if "Classification" not in type(model).__name__:
        return {**batch, "labels": tokens}
    mask = torch.ones_like(tokens)
    mask[0, 5:] = 0
    return {**batch, "attention_mask": mask, "labels": torch.tensor([0, 1, 1])}


def outputs(model, batch):
    """Return what a model makes of a batch."""
    with torch.no_grad():
        return model(**batch).logits


def pruned_copy(model, pruning, seed=0):
    """Return a pruned copy of a model, and what was cut."""
    copied = copy.deepcopy(model)
    partition = model_partition(copied)
    cuts = cuts_of(copied, partition, pruning, seed=seed)
    prune(copied, partition, cuts)
    return copied, cuts


def zeroed(model, cuts, paths=lambda path: path):
    """Return a copy of a model in which what was cut contributes nothing."""
    copied = copy.deepcopy(model)
    for path, cut in cuts.items():
        if cut.side == "inputs":
            linear = copied.get_submodule(paths(path))
            is_kept = torch.zeros(cut.width)
            is_kept[torch.from_numpy(cut.kept)] = 1
            is_linear = isinstance(linear, torch.nn.Linear)
            linear.weight.data *= is_kept if is_linear else is_kept[:, None]
    return copied


HALF = Pruning(heads=0.5, neurons=0.5)
