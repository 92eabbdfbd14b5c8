"""Tiny sequence classifiers of several families, and a tokenizer for them."""

from __future__ import annotations

import tokenizers
import torch
import transformers

WORDS = ("a", "cat", "dog", "sleeps", "barks", "sees", "no", "every", "bird", "sings")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
SIZES = {
    "vocab_size": len(SPECIAL) + len(WORDS),
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 34,
    "pad_token_id": 0,
}
# Names of the families as transformers spells them, and what they are built with.
FAMILIES = {
    "Bert": SIZES,
    "Roberta": SIZES | {"type_vocab_size": 1},
    "Camembert": SIZES | {"type_vocab_size": 1},
    "Electra": SIZES | {"embedding_size": 16},
    "Albert": SIZES | {"embedding_size": 8},
    "DebertaV2": SIZES | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "MPNet": SIZES,
    "DistilBert": {
        "vocab_size": SIZES["vocab_size"],
        **{"dim": 16, "hidden_dim": 32, "n_heads": 2, "n_layers": 2},
        "max_position_embeddings": 34,
    },
    "XLNet": {
        "vocab_size": SIZES["vocab_size"],
        **{"d_model": 16, "d_inner": 32, "n_head": 2, "n_layer": 2, "pad_token_id": 0},
    },
    "GPT2": {
        "vocab_size": SIZES["vocab_size"],
        **{"n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 32},
        **{"bos_token_id": 2, "eos_token_id": 3},
    },
    "Llama": SIZES | {"bos_token_id": 2, "eos_token_id": 3},
}


def tiny_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of words as BERT's: it numbers the sentences of a pair."""
    words = {word: number for number, word in enumerate((*SPECIAL, *WORDS))}
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(words, unk_token="[UNK]")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **{"pad_token": "[PAD]", "unk_token": "[UNK]"},
        **{"cls_token": "[CLS]", "sep_token": "[SEP]"},
    )


def tiny_model(family: str, **options) -> transformers.PreTrainedModel:
    """A classifier of a family with random weights."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        **FAMILIES.get(family, SIZES) | options
    )
    return getattr(transformers, f"{family}ForSequenceClassification")(config).eval()


def save_tiny(directory, family: str, **options) -> str:
    """Save a tiny classifier with its tokenizer; return where, for load_classifier."""
    tiny_model(family, **options).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return str(directory)
