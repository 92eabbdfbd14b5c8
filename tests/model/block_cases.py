"""Models of many kinds, and the blocks that their parameters' names tell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from torch import nn

from tests.conftest import SMALL

# Architecture -> (configuration, classifier, stack, first names of head parameters).
FAMILIES = {
    "roberta": (
        hf.RobertaConfig(**SMALL),
        hf.RobertaForSequenceClassification,
        "roberta.encoder.layer",
        {"classifier.dense", "classifier.out_proj"},
    ),
    "bert": (
        hf.BertConfig(**SMALL),
        hf.BertForSequenceClassification,
        "bert.encoder.layer",
        {"bert.pooler.dense", "classifier"},
    ),
    "distilbert": (
        hf.DistilBertConfig(
            dim=16, hidden_dim=32, n_heads=2, n_layers=3, vocab_size=60
        ),
        hf.DistilBertForSequenceClassification,
        "distilbert.transformer.layer",
        {"pre_classifier", "classifier"},
    ),
    "deberta-v2": (
        hf.DebertaV2Config(
            **SMALL,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            position_buckets=8,
            norm_rel_ebd="layer_norm",
        ),
        hf.DebertaV2ForSequenceClassification,
        "deberta.encoder.layer",
        {"pooler.dense", "classifier"},
    ),
    "gpt2": (
        hf.GPT2Config(
            n_embd=16,
            n_head=2,
            n_layer=3,
            vocab_size=60,
            bos_token_id=0,
            eos_token_id=0,
        ),
        hf.GPT2ForSequenceClassification,
        "transformer.h",
        {"transformer.ln_f", "score"},
    ),
    "llama": (
        hf.LlamaConfig(**SMALL, num_key_value_heads=1),
        hf.LlamaForSequenceClassification,
        "model.layers",
        {"model.norm", "score"},
    ),
    "vit": (
        hf.ViTConfig(
            **{k: v for k, v in SMALL.items() if k != "vocab_size"},
            image_size=32,
            patch_size=16,
        ),
        hf.ViTForImageClassification,
        None,
        {"vit.layernorm", "classifier"},
    ),
}


@dataclass(frozen=True)
class Case:
    """A model, how it is divided, and what should come out."""

    make: Callable[[], nn.Module]
    num_blocks: int
    # Modules of the head, by the part of their name behind the common prefix.
    head: set[str]
    by_hand: dict[str, Any] = field(default_factory=dict)
    # Modules that run only after the last block, and yet stay frozen.
    frozen_behind: str = "nothing"
    batch: str = "text"


VISION = {
    **{k: v for k, v in SMALL.items() if k != "vocab_size"},
    "image_size": 32,
    "patch_size": 16,
}
DECODER = {**SMALL, "num_key_value_heads": 1, "pad_token_id": 0}
GPT2 = {"n_embd": 16, "n_head": 2, "n_layer": 3, "vocab_size": 60, "pad_token_id": 0}
T5 = {
    "d_model": 16,
    "d_ff": 32,
    "d_kv": 8,
    "num_heads": 2,
    "num_layers": 3,
    "vocab_size": 60,
    "decoder_start_token_id": 0,
    "eos_token_id": 1,
}
SWIN = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [2, 2, 4],
    "num_heads": [2, 2, 2],
    "window_size": 4,
}
RESNET = {
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 16],
    "depths": [2, 3, 2],
    "layer_type": "basic",
}


class Residual(nn.Module):
    def __init__(self, width_in, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        if width_in != width:
            self.downsample = nn.Sequential(
                nn.Conv2d(width_in, width, 1, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x):
        shortcut = self.downsample(x) if hasattr(self, "downsample") else x
        return torch.relu(shortcut + self.bn1(self.conv1(x)))


class TorchvisionResNet(nn.Module):
    """The names of torchvision's ResNets: conv1, bn1, layer1, ..., layer4, fc."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 7, stride=4, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        widths = [8, 8, 12, 16, 20]
        for stage in range(1, 5):
            before, width = widths[stage - 1 : stage + 1]
            layers = nn.Sequential(Residual(before, width), Residual(width, width))
            self.add_module(f"layer{stage}", layers)
        self.fc = nn.Linear(20, 2)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        for stage in range(1, 5):
            x = self.get_submodule(f"layer{stage}")(x)
        return self.fc(x.mean((2, 3)))


class RegisteredLate(nn.Module):
    """Registers its modules in another order than it runs them."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 2)
        self.late = nn.Linear(4, 4)
        self.early = nn.Linear(6, 4)

    def forward(self, x):
        return self.fc(torch.tanh(self.late(torch.tanh(self.early(x)))))


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


def perceptron():
    return nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)
    )


def equal_sequential():
    return nn.Sequential(Mlp(6), Mlp(6), Mlp(6))


def norms():
    return nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2))


def mixed_sequential():
    return nn.Sequential(nn.Linear(6, 4), Mlp(4), nn.Dropout(0.0), Mlp(4), norms())


DEBERTA = {
    **SMALL,
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 8,
    "norm_rel_ebd": "layer_norm",
}
NORM_AND_SCORE = {"model.norm", "score"}

CASES = {
    **{
        family: Case(lambda f=family: FAMILIES[f][1](FAMILIES[f][0]), 3, head)
        for family, head in {
            "roberta": {"classifier.dense", "classifier.out_proj"},
            "bert": {"bert.pooler.dense", "classifier"},
            "distilbert": {"pre_classifier", "classifier"},
            "deberta-v2": {"pooler.dense", "classifier"},
        }.items()
    },
    # Its convolution runs between the first and the second layer: nobody trains it.
    "deberta-v2 with convolution": Case(
        lambda: hf.DebertaV2ForSequenceClassification(
            hf.DebertaV2Config(**DEBERTA, conv_kernel_size=3)
        ),
        3,
        {"pooler.dense", "classifier"},
    ),
    "electra": Case(
        lambda: hf.ElectraForSequenceClassification(
            hf.ElectraConfig(**SMALL, embedding_size=8)
        ),
        3,
        {"classifier.dense", "classifier.out_proj"},
    ),
    "gpt2": Case(
        lambda: hf.GPT2ForSequenceClassification(hf.GPT2Config(**GPT2)),
        3,
        {"transformer.ln_f", "score"},
    ),
    # Its output layer is its input embedding, which runs before the blocks, too.
    "gpt2 language model": Case(
        lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)),
        3,
        {"transformer.ln_f"},
        batch="sequence",
    ),
    "llama": Case(
        lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**DECODER)),
        3,
        NORM_AND_SCORE,
    ),
    "qwen2": Case(
        lambda: hf.Qwen2ForSequenceClassification(hf.Qwen2Config(**DECODER)),
        3,
        NORM_AND_SCORE,
    ),
    # Back-propagation to the encoder passes the decoder, which nobody trains.
    "t5 encoder": Case(
        lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)),
        3,
        {"encoder.final_layer_norm", "decoder.final_layer_norm"},
        {"stack": "encoder.block"},
        frozen_behind="decoder.block.",
        batch="sequence",
    ),
    "t5 decoder": Case(
        lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)),
        3,
        {"decoder.final_layer_norm"},
        {"stack": "decoder.block"},
        batch="sequence",
    ),
    "t5 encoder and decoder": Case(
        lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)),
        6,
        {"decoder.final_layer_norm"},
        {"blocks": r"(encoder|decoder)\.block\.\d+"},
        batch="sequence",
    ),
    "t5 classifier, decoder": Case(
        lambda: hf.T5ForSequenceClassification(hf.T5Config(**T5)),
        3,
        {
            "transformer.decoder.final_layer_norm",
            "classification_head.dense",
            "classification_head.out_proj",
        },
        {"stack": "transformer.decoder.block"},
        batch="sequence classification",
    ),
    "vit": Case(
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**VISION)),
        3,
        {"vit.layernorm", "classifier"},
        batch="images",
    ),
    "deit": Case(
        lambda: hf.DeiTForImageClassification(hf.DeiTConfig(**VISION)),
        3,
        {"deit.layernorm", "classifier"},
        batch="images",
    ),
    "swin by stages": Case(
        lambda: hf.SwinForImageClassification(hf.SwinConfig(**SWIN)),
        3,
        {"swin.layernorm", "classifier"},
        {"stack": "swin.encoder.layers"},
        batch="images",
    ),
    # The maps between the stages belong to no block.
    "swin by layers": Case(
        lambda: hf.SwinForImageClassification(hf.SwinConfig(**SWIN)),
        8,
        {"swin.layernorm", "classifier"},
        {"blocks": r"swin\.encoder\.layers\.\d+\.blocks\.\d+"},
        batch="images",
    ),
    "resnet by stages": Case(
        lambda: hf.ResNetForImageClassification(hf.ResNetConfig(**RESNET)),
        3,
        {"classifier.1"},
        {"stack": "resnet.encoder.stages"},
        batch="images",
    ),
    "resnet by layers": Case(
        lambda: hf.ResNetForImageClassification(hf.ResNetConfig(**RESNET)),
        7,
        {"classifier.1"},
        {"blocks": r"resnet\.encoder\.stages\.\d+\.layers\.\d+"},
        batch="images",
    ),
    "torchvision's resnet by stages": Case(
        TorchvisionResNet,
        4,
        {"fc"},
        {"blocks": ["conv1|bn1|layer1", "layer2", "layer3", "layer4"]},
        batch="tensor of images",
    ),
    "torchvision's resnet by layers": Case(
        TorchvisionResNet,
        8,
        {"fc"},
        {"blocks": r"layer\d\.\d+"},
        batch="tensor of images",
    ),
    "perceptron": Case(perceptron, 3, set(), {"blocks": r"\d+"}, batch="tensor"),
    "perceptron with head": Case(
        perceptron, 2, {"4"}, {"blocks": ["0", "2"]}, batch="tensor"
    ),
    "sequential of equal modules": Case(equal_sequential, 3, set(), batch="tensor"),
    "sequential of unlike modules": Case(
        mixed_sequential, 2, {"4.0", "4.1"}, {"blocks": ["1", "3"]}, batch="tensor"
    ),
}


def batch_of(kind):
    torch.manual_seed(1)
    ids = torch.randint(5, 60, (4, 7))
    ends = torch.cat([ids, torch.ones(4, 1, dtype=torch.long)], dim=1)
    labels = torch.tensor([0, 1, 1, 0])
    return {
        "text": {"input_ids": ids, "labels": labels},
        "sequence": {"input_ids": ids, "labels": ids},
        "sequence classification": {"input_ids": ends, "labels": labels},
        "images": {"pixel_values": torch.randn(4, 3, 32, 32), "labels": labels},
        "tensor of images": {"input": torch.randn(4, 3, 32, 32), "labels": labels},
        "tensor": {"input": torch.randn(4, 6), "labels": labels},
    }[kind]


def built(case):
    torch.manual_seed(0)
    return case.make().eval(), batch_of(case.batch)


def module_of(name):
    return name.rpartition(".")[0]


def modules_of(names):
    return {module_of(name) for name in names}
