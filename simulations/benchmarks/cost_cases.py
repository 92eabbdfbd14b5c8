"""Models whose costs are counted and run: language, adapters, images, sound.

Small ones: the ratios do not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from simulations.benchmarks.cost_models import (
    BART,
    DECODER,
    ENCODER,
    GPT2,
    LORA,
    RESNET,
    SWIN,
    T5,
    VISION,
    WAV2VEC2,
    WHISPER,
    Recurrent,
    SideNetwork,
    checkpointed,
    contrastive,
    encoder_layers,
    half_pruned,
    llama,
    quantised,
)

TOKENS = 96


@dataclass(frozen=True)
class Case:
    """A model and how it is counted."""

    make: Callable[[], nn.Module]
    blocks: Mapping[str, str] = field(default_factory=dict)
    example: Mapping[str, Tensor] | Tensor | None = None
    tuning: str = "full"
    options: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32


_ONE = torch.zeros(1, dtype=torch.long)
_ENDED = torch.full((1, TOKENS), 5)
_ENDED[0, -1] = 2  # the token whose hidden state is classified
_CHOICES = {
    "input_ids": torch.zeros(1, 4, TOKENS, dtype=torch.long),
    "attention_mask": torch.ones(1, 4, TOKENS, dtype=torch.long),
    "labels": _ONE,
}
_SOUND = {"input_values": torch.zeros(1, 8000)}
_IMAGE = {"pixel_values": torch.zeros(1, 3, 64, 64), "labels": _ONE}

CASES: dict[str, Case] = {
    "BERT classifier": Case(
        lambda: hf.BertForSequenceClassification(hf.BertConfig(**ENCODER))
    ),
    "RoBERTa classifier": Case(
        lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**ENCODER))
    ),
    "RoBERTa, LoRA": Case(
        lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**ENCODER)),
        tuning="lora",
        options=LORA,
    ),
    "RoBERTa, LoRA on half of it": Case(
        lambda: half_pruned(
            hf.RobertaForSequenceClassification(hf.RobertaConfig(**ENCODER))
        ),
        tuning="lora",
        options=LORA,
    ),
    "RoBERTa, DoRA": Case(
        lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**ENCODER)),
        tuning="lora",
        options={**LORA, "use_dora": True},
    ),
    "RoBERTa, VeRA": Case(
        lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**ENCODER)),
        tuning="vera",
        options={"r": 16},
    ),
    "RoBERTa, IA3": Case(
        lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**ENCODER)),
        tuning="ia3",
    ),
    "RoBERTa, OFT": Case(
        lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**ENCODER)),
        tuning="oft",
        options={"oft_block_size": 16},
    ),
    "RoBERTa, SHiRA (sparse)": Case(
        lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**ENCODER)),
        tuning="shira",
        options={"r": 4},
    ),
    "RoBERTa, FRoD (sparse)": Case(
        lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**ENCODER)),
        tuning="frod",
    ),
    "RoBERTa, PaCA": Case(
        lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**ENCODER)),
        tuning="paca",
        options={"r": 8},
    ),
    "RoBERTa, SVFit": Case(
        lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**ENCODER)),
        tuning="svfit",
    ),
    "RoBERTa, SVFit of 16": Case(
        lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**ENCODER)),
        tuning="svfit",
        options={"k": 16},
    ),
    "RoBERTa, LaMDA": Case(
        lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**ENCODER)),
        tuning="lamda",
        options={"r": 8},
    ),
    "RoBERTa, PEQA of 4 bits": Case(
        lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**ENCODER)),
        tuning="peqa",
    ),
    "RoBERTa, PEQA of 8 bits, grouped": Case(
        lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**ENCODER)),
        tuning="peqa",
        options={"bits": 8, "group_size": 32},
    ),
    "DistilBERT classifier": Case(
        lambda: hf.DistilBertForSequenceClassification(
            hf.DistilBertConfig(
                vocab_size=2000, dim=128, hidden_dim=512, n_heads=4, n_layers=4
            )
        )
    ),
    "DeBERTa-v2 classifier": Case(
        lambda: hf.DebertaV2ForSequenceClassification(
            hf.DebertaV2Config(
                **ENCODER,
                relative_attention=True,
                pos_att_type=["p2c", "c2p"],
                position_buckets=32,
                norm_rel_ebd="layer_norm",
            )
        )
    ),
    "ELECTRA classifier": Case(
        lambda: hf.ElectraForSequenceClassification(
            hf.ElectraConfig(**ENCODER, embedding_size=64)
        )
    ),
    "BERT masked LM": Case(lambda: hf.BertForMaskedLM(hf.BertConfig(**ENCODER))),
    "BERT token classifier": Case(
        lambda: hf.BertForTokenClassification(hf.BertConfig(**ENCODER))
    ),
    "BERT question answering": Case(
        lambda: hf.BertForQuestionAnswering(hf.BertConfig(**ENCODER))
    ),
    "BERT multiple choice": Case(
        lambda: hf.BertForMultipleChoice(hf.BertConfig(**ENCODER)), example=_CHOICES
    ),
    "GPT-2 classifier": Case(
        lambda: hf.GPT2ForSequenceClassification(hf.GPT2Config(**GPT2))
    ),
    "GPT-2 LM (tied head)": Case(lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2))),
    "GPT-2 LM, LoRA": Case(
        lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)), tuning="lora", options=LORA
    ),
    "GPT-2 LM, PaCA": Case(
        lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)),
        tuning="paca",
        options={"r": 8},
    ),
    "GPT-2 LM, PEQA of 4 bits": Case(
        lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)), tuning="peqa"
    ),
    "Llama classifier": Case(
        lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**DECODER))
    ),
    "Llama LM": Case(llama),
    "Llama LM, tied head": Case(lambda: llama(tie_word_embeddings=True)),
    "Llama LM, large vocabulary": Case(lambda: llama(vocab_size=32000)),
    "Llama LM, LoRA": Case(llama, tuning="lora", options=LORA),
    "Llama LM, LoRA on bf16": Case(
        llama, tuning="lora", options=LORA, dtype=torch.bfloat16
    ),
    "Llama LM, LoRA on nf4": Case(quantised(llama, 4), tuning="lora", options=LORA),
    "Llama LM, LoRA on int8": Case(quantised(llama, 8), tuning="lora", options=LORA),
    "Llama LM, LoRA on half of it": Case(
        lambda: half_pruned(llama()), tuning="lora", options=LORA
    ),
    "Llama LM, checkpointed": Case(checkpointed),
    "Qwen2 LM": Case(lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**DECODER))),
    "Qwen3 LM": Case(
        lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**DECODER, head_dim=32))
    ),
    "Gemma 2 LM": Case(
        lambda: hf.Gemma2ForCausalLM(
            hf.Gemma2Config(**DECODER, head_dim=32, sliding_window=48)
        )
    ),
    "Mistral LM": Case(lambda: hf.MistralForCausalLM(hf.MistralConfig(**DECODER))),
    "OLMoE LM (experts)": Case(
        lambda: hf.OlmoeForCausalLM(
            hf.OlmoeConfig(**DECODER, num_experts=4, num_experts_per_tok=2)
        )
    ),
    "T5, encoder": Case(
        lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)),
        {"stack": "encoder.block"},
    ),
    "T5, decoder": Case(
        lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)),
        {"stack": "decoder.block"},
    ),
    "BART, encoder": Case(
        lambda: hf.BartForConditionalGeneration(hf.BartConfig(**BART)),
        {"stack": "model.encoder.layers"},
    ),
    "BART, decoder": Case(
        lambda: hf.BartForConditionalGeneration(hf.BartConfig(**BART)),
        {"stack": "model.decoder.layers"},
    ),
    "BART classifier": Case(
        lambda: hf.BartForSequenceClassification(hf.BartConfig(**BART)),
        {"stack": "model.decoder.layers"},
        example={"input_ids": _ENDED, "labels": _ONE},
    ),
    "Whisper, encoder": Case(
        lambda: hf.WhisperForConditionalGeneration(hf.WhisperConfig(**WHISPER)),
        {"stack": "model.encoder.layers"},
    ),
    "Whisper, decoder": Case(
        lambda: hf.WhisperForConditionalGeneration(hf.WhisperConfig(**WHISPER)),
        {"stack": "model.decoder.layers"},
    ),
    "wav2vec2 CTC": Case(
        lambda: hf.Wav2Vec2ForCTC(hf.Wav2Vec2Config(**WAV2VEC2)),
        example={**_SOUND, "labels": torch.ones(1, 6, dtype=torch.long)},
    ),
    "wav2vec2 classifier": Case(
        lambda: hf.Wav2Vec2ForSequenceClassification(hf.Wav2Vec2Config(**WAV2VEC2)),
        example={**_SOUND, "labels": _ONE},
    ),
    "ViT classifier": Case(
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**VISION))
    ),
    "Swin, by stages": Case(
        lambda: hf.SwinForImageClassification(hf.SwinConfig(**SWIN)),
        {"stack": "swin.encoder.layers"},
    ),
    "ResNet, by stages": Case(
        lambda: hf.ResNetForImageClassification(hf.ResNetConfig(**RESNET)),
        {"stack": "resnet.encoder.stages"},
        example=_IMAGE,
    ),
    "ConvNeXt, by stages": Case(
        lambda: hf.ConvNextForImageClassification(
            hf.ConvNextConfig(
                image_size=64, hidden_sizes=[32, 64, 96, 128], depths=[2] * 4
            )
        ),
        {"stack": "convnext.encoder.stages"},
    ),
    "CLIP, contrastive": Case(
        contrastive,
        {"stack": "vision_model.encoder.layers"},
        example={
            "input_ids": torch.zeros(1, 32, dtype=torch.long),
            "pixel_values": torch.zeros(1, 3, 64, 64),
            "return_loss": True,
        },
    ),
    "PyTorch's encoder": Case(
        encoder_layers, {"blocks": r"[0-3]"}, example=torch.zeros(1, 96, 128)
    ),
    "Side network": Case(
        SideNetwork, {"stack": "side"}, example=torch.zeros(1, 96, 128)
    ),
    "LSTM": Case(
        lambda: Recurrent(onednn=True),
        {"stack": "layers"},
        example=torch.zeros(1, 96, dtype=torch.long),
    ),
    "LSTM without oneDNN": Case(
        lambda: Recurrent(onednn=False),
        {"stack": "layers"},
        example=torch.zeros(1, 96, dtype=torch.long),
    ),
}
