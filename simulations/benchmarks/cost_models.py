"""Plain modules and configurations of the models whose costs are counted and run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from lola_flwr.d2ft.cuts import cuts_of
from lola_flwr.d2ft.pruned import prune
from lola_flwr.d2ft.pruning import Pruning
from lola_flwr.model.adapter_blocks import model_partition

ENCODER = {
    "vocab_size": 2000,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 5,
    "max_position_embeddings": 160,
}
DECODER = {
    **ENCODER,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {
    "vocab_size": 2000,
    "n_embd": 128,
    "n_head": 4,
    "n_layer": 5,
    "n_positions": 160,
    "pad_token_id": 0,
}
T5 = {
    "vocab_size": 2000,
    "d_model": 128,
    "d_ff": 512,
    "d_kv": 32,
    "num_heads": 4,
    "num_layers": 4,
    "decoder_start_token_id": 0,
}
BART = {
    "vocab_size": 2000,
    "d_model": 128,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 512,
    "decoder_ffn_dim": 512,
    "max_position_embeddings": 160,
}
WHISPER = {
    **BART,
    "num_mel_bins": 40,
    "max_source_positions": 200,
    "max_target_positions": 160,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
}
WAV2VEC2 = {
    "vocab_size": 32,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "conv_dim": (64,) * 7,
    "num_conv_pos_embedding_groups": 4,
    "layerdrop": 0.0,  # whose draws the operations would follow
}
VISION = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "image_size": 64,
    "patch_size": 8,
}
SWIN = {
    "image_size": 64,
    "patch_size": 2,
    "embed_dim": 32,
    "depths": [2, 2, 4],
    "num_heads": [2, 4, 8],
    "window_size": 4,
}
RESNET = {"embedding_size": 32, "hidden_sizes": [32, 64, 128], "depths": [2, 2, 2]}
LORA = {"r": 8, "lora_dropout": 0.1}


class SideNetwork(nn.Module):
    """A small network beside a frozen one, as Ladder Side-Tuning has it.

    Gradients do not pass the frozen layers: each gives what it computes to a layer of
    the side network.
    """

    def __init__(self, width: int = 128, side: int = 32, layers: int = 4) -> None:
        super().__init__()
        options: Any = {"nhead": 4, "dim_feedforward": 4 * width, "batch_first": True}
        body = [nn.TransformerEncoderLayer(width, **options) for _ in range(layers)]
        self.body = nn.ModuleList(body).requires_grad_(False)
        self.downs = nn.ModuleList(nn.Linear(width, side) for _ in range(layers))
        self.side = nn.ModuleList(nn.Linear(side, side) for _ in range(layers))
        self.classifier = nn.Linear(side, 2)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the classes' scores of each sequence."""
        aside: Tensor | float = 0.0
        for layer, down, step in zip(self.body, self.downs, self.side, strict=True):
            hidden = layer(hidden)
            aside = torch.relu(step(aside + down(hidden)))
        scores: Tensor = self.classifier(aside.mean(dim=1))
        return scores


class Recurrent(nn.Module):
    """Recurrent layers, one on another."""

    def __init__(self, *, onednn: bool, width: int = 96, layers: int = 4) -> None:
        super().__init__()
        self.onednn = onednn
        self.embed = nn.Embedding(500, width)
        self.layers = nn.ModuleList(
            nn.LSTM(width, width, batch_first=True) for _ in range(layers)
        )
        self.classifier = nn.Linear(width, 2)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the classes' scores of each sequence."""
        hidden = self.embed(ids)
        with torch.backends.mkldnn.flags(enabled=self.onednn):
            for layer in self.layers:
                hidden, _ = layer(hidden)
        scores: Tensor = self.classifier(hidden[:, -1])
        return scores


def encoder_layers() -> nn.Module:
    """Return PyTorch's own encoder."""
    layer = nn.TransformerEncoderLayer(128, 4, 512, batch_first=True)
    return nn.Sequential(*nn.TransformerEncoder(layer, 4).layers, nn.Linear(128, 2))


def quantised(make: Callable[[], nn.Module], bits: int) -> Callable[[], nn.Module]:
    """Return what makes a model whose layers' weights have 4 or 8 bits."""

    def made() -> nn.Module:
        import bitsandbytes as bnb

        model = make()
        for name, linear in list(model.named_modules()):
            if not isinstance(linear, nn.Linear) or "layers" not in name:
                continue
            sizes = (linear.in_features, linear.out_features)
            new = (
                bnb.nn.Linear4bit(
                    *sizes, bias=False, quant_type="nf4", compute_dtype=torch.float32
                )
                if bits == 4
                else bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
            )
            new.load_state_dict(linear.state_dict())
            model.set_submodule(name, new.to("cpu"))
        model.requires_grad_(False)
        setattr(model, f"is_loaded_in_{bits}bit", True)
        return model

    return made


def llama(**options: Any) -> nn.Module:
    """Return a Llama that predicts the next token."""
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**DECODER, **options}))


def half_pruned(model: nn.Module) -> nn.Module:
    """Return a model without half of its heads and neurons."""
    partition = model_partition(model)
    half = Pruning(heads=0.5, neurons=0.5)
    prune(model, partition, cuts_of(model, partition, half))
    return model


def checkpointed() -> nn.Module:
    """Return a Llama that computes its layers again on the way back."""
    model = llama()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def contrastive() -> nn.Module:
    """Return a CLIP, whose loss compares each image with each text of the batch."""
    tower = {k: v for k, v in VISION.items() if k != "image_size"}
    return hf.CLIPModel(
        hf.CLIPConfig(
            text_config={**tower, "vocab_size": 2000, "max_position_embeddings": 96},
            vision_config=VISION,
            projection_dim=64,
        )
    )
