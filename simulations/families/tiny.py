"""Tiny configurations of any family: the default one with its sizes made small."""

from __future__ import annotations

import re
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

VOCABULARY = 128
LAYERS = 4

# A field of whole numbers is made as small as the first pattern that its whole name
# matches says; others stay as they are.
_SIZES = [
    (re.compile(pattern), size)
    for pattern, size in {
        # How often, how far and by how much are no sizes.
        r".*(period|offset|interval|pattern|stride|factor|ratio|rate|kernel).*": None,
        r".*(feat_extract_layers|window_layers)|qk_head_dim": None,
        r".*vocab_size.*": VOCABULARY,
        r"codebook_size": 16,
        r"(num|n)_filters": 4,
        r"(up|down)sample_groups": 32,
        r"(n_group|topk_group|num_expert_group)": 1,
        r".*experts_per_tok.*|moe_k|moe_topk|num_selected_experts": 2,
        r".*num_experts|n_routed_experts|.*local_experts": 4,
        r".*(key_value_heads|kv_heads|query_groups|num_key_heads)": 2,
        r".*(num|n|encoder|decoder|attention)_(\w+_)?heads?": 4,
        r".*(head_dim|head_size|dim_head|d_head|headdim|kv_channels|d_kv)": 8,
        r".*(n_layers?|num_layers|hidden_layers|(encoder|decoder)_layers)": LAYERS,
        r"(num_blocks|depth|[lxr]_layers)": LAYERS,
        r".*(intermediate|ffn|feed_forward|mlp|d_inner|dff|d_ff|dim_ff).*": 64,
        r".*(lora_rank|rank)": 8,
        r".*(hidden_size|d_model|n_embd|embed_dim|emb_dim|embedding_size).*": 32,
        r".*(hidden_dim|embedding_dim|emb_size|projection_dim|proj_dim).*": 32,
        r"(dim|lru_width|d_latents|classifier_proj_size)": 32,
        r"(image|crop)_size": 64,
        r"num_self_attends_per_block": LAYERS,
        r"num_latents": 16,
        r"num_frames|frames_per_clip": 4,
        r"max_source_positions": 24,
    }.items()
]
# Of a network in stages: widths are divided by eight, and a stage keeps two layers.
_WIDTHS = re.compile(r".*(dims?|hidden_sizes|embed_dims|channels|attn_unit_dims)")
_DEPTHS = re.compile(r".*(depths?|num_blocks|repeats|attn_blocks|block_sizes)")


def tiny_config(model_type: str) -> PreTrainedConfig:
    """Return a family's configuration with small sizes and few layers."""
    return _shrunk(CONFIG_MAPPING[model_type], EXCEPTIONS.get(model_type, {}))


def _shrunk(kind: type[PreTrainedConfig], given: dict[str, Any]) -> PreTrainedConfig:
    arguments: dict[str, Any] = {}
    own = {**given}
    for name, value in vars(kind()).items():
        if isinstance(value, PreTrainedConfig):
            of_part = EXCEPTIONS.get(value.model_type, {}) | own.pop(name, {})
            arguments[name] = _shrunk(type(value), of_part)
        elif isinstance(value, list | tuple):
            if (small := [_small_in_stages(name, each) for each in value]) != [*value]:
                arguments[name] = type(value)(small)
        elif (small := _small(name, value)) != value:
            arguments[name] = small
    if "kv_lora_rank" in arguments:  # latent attention has no groups
        arguments["num_key_value_heads"] = 4
    # A layer left out at random has no gradient.
    arguments |= {name: 0.0 for name in vars(kind()) if name.endswith("layerdrop")}
    small = kind(**arguments | own)
    if getattr(small, "pad_token_id", 0) is None:
        small.pad_token_id = 0  # a classifier's batches are padded
    return small


def _small(name: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    # Ids of special tokens have to be in the vocabulary.
    if re.fullmatch(r".*_token(_id|_index)|(pad|eos|bos)_index", name):
        return value % 90 + 8 if value >= VOCABULARY else value
    size = next((size for p, size in _SIZES if p.fullmatch(name)), None)
    return value if size is None else min(size, value)


def _small_in_stages(name: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if _WIDTHS.fullmatch(name):
        return value if value < 16 else max(8, value // 64 * 8)
    if _DEPTHS.fullmatch(name):
        return min(2, value)
    return _small(name, value)


# What a family needs besides, and why.
_MAMBA_HEADS = {"mamba_d_head": 16}  # four heads of twice the hidden size
# Windows and heads divide the tokens and the widths of the stages.
_WINDOWS = {"num_heads": [1, 2, 2, 4], "window_size": 4, "patch_size": 2}
_CROSS_ATTENTION = {"is_decoder": True, "add_cross_attention": True}
# The file's format has queries, keys and values in one matrix, of three equal parts.
_EQUAL_HEADS = {"num_key_value_heads": 4}
_ATTENTION_WINDOW = {"attention_window": 8}  # a text is padded to its multiple
EXCEPTIONS: dict[str, dict[str, Any]] = {
    # Left open by the default configuration, but needed by the model.
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e4}
        }
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8}},
    "encoder-decoder": {"decoder": _CROSS_ATTENTION},
    "speech-encoder-decoder": {"decoder": _CROSS_ATTENTION},
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 1},
    "granite_speech5_encoder": _EQUAL_HEADS,
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "conv"]},
    "ministral": {"head_dim": 8},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "nemotron": {"num_key_value_heads": 2},
    "wav2vec2-bert": {"vocab_size": VOCABULARY},
    "wav2vec2-conformer": {"vocab_size": VOCABULARY},
    "xmod": {"default_language": "en_XX"},
    # What must multiply, be equal, or come layer by layer.
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {**_MAMBA_HEADS, "attn_layer_indices": [1]},
    "bit": {"num_groups": 8},
    "bros": {"hidden_size": 64},
    "blt": {"use_cache": False},  # which it cannot have
    "blenderbot": {"encoder_layers": LAYERS},
    "codegen": {"rotary_dim": 4},
    "cvt": {"depth": [1, 2, 3], "embed_dim": [8, 16, 32], "num_heads": [1, 2, 2]},
    "donut-swin": _WINDOWS,
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots3_note_text": {"num_key_value_heads": 4},
    "efficientnet": {
        "hidden_dim": 1280,
        "width_coefficient": 1.0,
        "depth_coefficient": 1.0,
        "in_channels": [32, 8, 8, 8, 8, 8, 8],
        "out_channels": [8, 8, 8, 8, 8, 8, 8],
    },
    "esmc": {"num_key_value_heads": 4},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 8}},
    "gemma3n_text": {"intermediate_size": 64, "num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {
        **_MAMBA_HEADS,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "led": _ATTENTION_WINDOW,
    "longformer": _ATTENTION_WINDOW,
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4},
    "lilt": {"hidden_size": 48},
    "mamba2": {"head_dim": 16, "n_groups": 1},
    "minimax_m3_vl_text": {"rotary_dim": 4},
    "mobilebert": {"embedding_size": 32, "intra_bottleneck_size": 32},
    "nemotron_h": {"n_groups": 1},
    "mistral4": {"head_dim": 16},
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "nemotron3_5_transcribe_asr_audio": _EQUAL_HEADS,
    "nemotron3_5_transcribe_word_timestamp": _EQUAL_HEADS,
    "nemotron3_diarization_audio": _EQUAL_HEADS,
    "neomme": {"head_dim": 16},
    "perceiver": {
        "d_latents": 32,
        "d_model": 32,
        "qk_channels": 32,
        "v_channels": 32,
        "max_position_embeddings": 8,
    },
    "pegasus_x": {"block_size": 8, "num_global_tokens": 4},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "swin": _WINDOWS,
    "swinv2": _WINDOWS,
    "xlstm": {
        "hidden_size": 128,
        "embedding_dim": 128,
        "mode": "train",
        "chunk_size": 7,
    },
    "textnet": {"stem_out_channels": 8},
    "zamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_hidden_layers": 5,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "mamba_headdim": 8,
        "n_mamba_heads": 8,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
}
