"""Linear maps as they are cut: as PyTorch has them, or transposed, or adapted."""

from __future__ import annotations

from typing import Any

from torch import nn

from lola_flwr.errors import UserError


class LayerNotUnderstood(UserError):
    """A layer does not consist of what can be divided."""


def out_features(linear: nn.Module) -> int:
    """Return the width of a linear map's output, adapter or not."""
    base = base_of(linear)
    return int(base.weight.shape[outputs_dim(base)])


def in_features(linear: nn.Module) -> int:
    """Return the width of a linear map's input, adapter or not."""
    base = base_of(linear)
    return int(base.weight.shape[1 - outputs_dim(base)])


def is_linear(module: object) -> bool:
    """Tell whether a module is a plain linear map."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))


def outputs_dim(base: nn.Module) -> int:
    """Return the dimension of a linear map's weight that counts its outputs."""
    return 0 if isinstance(base, nn.Linear) else 1  # GPT-2's are transposed


def base_of(linear: Any) -> Any:
    """Return the linear map itself: the one beneath its adapter, if it has one."""
    base = getattr(linear, "base_layer", linear)
    if not is_linear(base):
        raise LayerNotUnderstood(
            f"{type(base).__name__} stands where a Linear is expected: only plain "
            "linear maps can be cut into sub-networks."
        )
    if not base.weight.is_floating_point():
        raise LayerNotUnderstood(
            f"{type(base).__name__} holds a quantised weight ({base.weight.dtype}), "
            "which cannot be cut into head groups; load the model in float32."
        )
    return base


def adapters_of(linear: Any) -> list[tuple[nn.Linear, nn.Linear, float, Any]]:
    """Return a linear map's low-rank adapters: A, B, scale and dropout of each."""
    if not hasattr(linear, "lora_A"):
        if hasattr(linear, "base_layer"):
            raise LayerNotUnderstood(
                f"{type(linear).__name__} is an adapter that cannot be cut into head "
                "groups; use LoRA."
            )
        return []
    if getattr(linear, "lora_variant", None):
        raise LayerNotUnderstood(
            f"The adapter variants {sorted(linear.lora_variant)} cannot be cut into "
            "head groups; use plain LoRA."
        )
    return [
        (
            linear.lora_A[name],
            linear.lora_B[name],
            float(linear.scaling[name]),
            linear.lora_dropout[name],
        )
        for name in linear.active_adapters
        if name in linear.lora_A
    ]
