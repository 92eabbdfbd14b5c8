"""The model: a base, which every node has, and its adapters."""

import math

import torch
from generated import language_model
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def cosine_annealing(current_round, total_round, lrate_max, lrate_min):
    """Return the learning rate of a round."""
    cos_inner = math.pi * current_round / total_round
    return lrate_min + 0.5 * (lrate_max - lrate_min) * (1 + math.cos(cos_inner))


def get_model(base):
    """Load the base in a precision, and add adapters to it."""
    quantization_config = None
    if base == "4bit":
        quantization_config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4"
        )
    model = AutoModelForCausalLM.from_pretrained(
        language_model(),
        quantization_config=quantization_config,
        dtype=torch.bfloat16 if base == "bfloat16" else torch.float32,
    )
    if quantization_config is not None:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    peft_config = LoraConfig(
        r=8,
        lora_alpha=16,
        lora_dropout=0.075,
        target_modules=["q_proj", "v_proj", "up_proj", "down_proj"],
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, peft_config)
