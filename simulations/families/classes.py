"""Which model classes are tried, and what each is called with."""

from __future__ import annotations

import inspect
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from lola_flwr.model.backprop import Batch
from lola_flwr.model.example import example_of, token_ids
from simulations.families.check import seed_everything
from simulations.families.tiny import tiny_config

# The auto classes of text, images and sound, by the names of their mappings.
TASKS = {
    "SEQUENCE_CLASSIFICATION": "sequence classification",
    "TOKEN_CLASSIFICATION": "token classification",
    "QUESTION_ANSWERING": "question answering",
    "MULTIPLE_CHOICE": "multiple choice",
    "MASKED_LM": "masked language model",
    "CAUSAL_LM": "causal language model",
    "SEQ_TO_SEQ_CAUSAL_LM": "sequence to sequence",
    "IMAGE_CLASSIFICATION": "image classification",
    "VIDEO_CLASSIFICATION": "video classification",
    "AUDIO_CLASSIFICATION": "audio classification",
    "CTC": "speech, CTC",
    "SPEECH_SEQ_2_SEQ": "speech to text",
}
BATCH_SIZE = 3
_PADDING = 2


@dataclass(frozen=True)
class ModelClass:
    """A class of transformers.

    Parameters
    ----------
    name
        Its name.
    task
        The task that an automatic class finds it for.
    """

    name: str
    task: str


def model_classes() -> list[ModelClass]:
    """List the classes behind transformers' automatic classes, each once."""
    found: dict[str, ModelClass] = {}
    for mapping, task in TASKS.items():
        names = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES")
        for value in names.values():
            for name in [value] if isinstance(value, str) else value:
                found.setdefault(name, ModelClass(name, task))
    return list(found.values())


def build(kind: ModelClass) -> tuple[Any, dict[str, Tensor]]:
    """Build a tiny model in which no gradient vanishes, and a batch for its task.

    In float64 where the model can, so that rounding hides nothing.
    """
    seed_everything()
    model_type = getattr(transformers, kind.name)
    model = model_type(tiny_config(model_type.config_class.model_type)).eval()
    # What is never trained, as a table of sines, some models make when they are loaded,
    # and some make padding's embedding zero.
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape))
        for embedding in embeddings:
            if embedding.padding_idx is not None:
                embedding.weight[embedding.padding_idx] = 0
    batch = _batch(model, kind)
    _fit_running_statistics(model, batch)
    double = {n: v.double() if v.is_floating_point() else v for n, v in batch.items()}
    # Parts may compute in float32 whatever they are given, or know its range alone.
    with suppress(RuntimeError):
        if _is_finite(model.double(), double):
            return model, double
    if not _is_finite(model.float(), batch):
        raise ValueError("Loss or gradient is not a number.")
    return model, batch


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Return the model's own loss; of one that has none, that its scores shall be 0."""
    output = model(**batch)
    loss: Tensor | None = getattr(output, "loss", None)
    return output[0].square().mean() if loss is None else loss


def _is_finite(model: nn.Module, batch: Batch) -> bool:
    """Tell whether the loss and its gradient are numbers, in training."""
    loss = loss_of(model.train(), batch)
    weights = [values for values in model.parameters() if values.requires_grad]
    found = torch.autograd.grad(loss, weights, allow_unused=True)
    model.eval()
    return bool(loss.isfinite()) and all(
        bool(gradient.isfinite().all()) for gradient in found if gradient is not None
    )


def _batch(model: Any, kind: ModelClass) -> dict[str, Tensor]:
    """Make up a batch with the labels of the task; of texts the last one is padded."""
    batch = _inputs(model, kind)
    accepted = inspect.signature(model.forward).parameters
    for name, mask in (
        ("input_ids", "attention_mask"),
        ("decoder_input_ids", "decoder_attention_mask"),
    ):
        if name in batch and mask in accepted:
            batch[mask] = torch.ones_like(batch[name])
            batch[mask][-1, ..., -_PADDING:] = 0
            batch[name] = _padded(batch[name], model.config)
    texts = [n for n in ("decoder_input_ids", "input_ids", "inputs") if n in batch]
    tokens = batch[texts[0]] if texts else torch.empty(0)
    classes = torch.arange(BATCH_SIZE) % 2
    match kind.task:
        case "token classification":
            labels = tokens % 2
        case "question answering":
            return {**batch, "start_positions": classes, "end_positions": classes + 2}
        case "speech, CTC":
            if "input_features" in batch and "attention_mask" in accepted:
                frames = batch["input_features"][..., 0]
                batch["attention_mask"] = torch.ones_like(frames, dtype=torch.long)
            labels = 5 + torch.arange(6).reshape(BATCH_SIZE, 2)
            return {**batch, "labels": labels}
        case task if "language model" in task or task.endswith(("sequence", "to text")):
            labels = tokens.clone()
        case _:
            return batch | ({"labels": classes} if "labels" in accepted else {})
    labels[-1, -_PADDING:] = -100  # no label
    return {**batch, "labels": labels}


def _inputs(model: Any, kind: ModelClass) -> dict[str, Tensor]:
    """Make up what the library does not know how to make up, too."""
    unknown = _unknown_inputs(model, kind)
    if unknown is not None:
        return unknown
    batch = example_of(model, BATCH_SIZE)
    if kind.name.startswith("Splinter"):
        batch["input_ids"][..., 1] = model.config.question_token_id
    if kind.name in ("LongformerForQuestionAnswering", "LongformerForMultipleChoice"):
        # Between question and text; the end is the third.
        batch["input_ids"][..., [1, 2]] = model.config.sep_token_id
    if kind.name.startswith("Lxmert"):  # regions of an image
        batch["visual_feats"] = torch.randn(BATCH_SIZE, 5, model.config.visual_feat_dim)
        batch["visual_pos"] = torch.rand(BATCH_SIZE, 5, model.config.visual_pos_dim)
    if kind.name.startswith("Git"):  # labels count from behind the image
        batch["pixel_values"] = _images(model.config.vision_config.image_size)
    if kind.name.startswith("GraniteSpeech5"):  # four frames in one
        batch["input_features"] = batch["input_features"].repeat(1, 1, 4)
    return batch


def _unknown_inputs(model: Any, kind: ModelClass) -> dict[str, Tensor] | None:
    """Make up inputs of classes that the library is to be given an example of."""
    if kind.name.startswith("Perceiver"):
        if "image" in kind.task:
            return {"inputs": _images(model.config.image_size)}
        return {"inputs": 7 + torch.arange(8 * BATCH_SIZE).reshape(BATCH_SIZE, 8)}
    if kind.name.startswith("Siglip2"):  # images cut into patches, of any shape
        config = model.config.vision_config
        width = config.num_channels * config.patch_size**2
        return {
            "pixel_values": torch.randn(BATCH_SIZE, 16, width),
            "pixel_attention_mask": torch.ones(BATCH_SIZE, 16, dtype=torch.long),
            "spatial_shapes": torch.full((BATCH_SIZE, 2), 4),
        }
    if kind.name.startswith("SpeechEncoderDecoder"):
        sound = example_of(model.encoder, BATCH_SIZE)["input_values"]
        text = token_ids(model.decoder, 7, BATCH_SIZE)
        return {"inputs": sound, "decoder_input_ids": text}
    return None


def _images(size: int) -> Tensor:
    return torch.randn(BATCH_SIZE, 3, size, size)


def _fit_running_statistics(model: nn.Module, batch: Batch) -> None:
    """Let batch normalization keep up the signal that it would let die away."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    if not norms:
        return
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(**batch)
    model.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def _padded(tokens: Tensor, config: Any) -> Tensor:
    """Let the last text end earlier: its end token moves, and padding follows."""
    padding = getattr(config.get_text_config(), "pad_token_id", None) or 0
    tokens = tokens.clone()
    tokens[-1, ..., -_PADDING - 1] = tokens[-1, ..., -1]
    tokens[-1, ..., -_PADDING:] = padding
    return tokens
