"""PEQA: the weights are whole numbers, and only their scales are trained.

Kim, Lee, Kim, Park, Yoo, Kwon, Lee, "Memory-Efficient Fine-Tuning of Compressed Large
Language Models via sub-4-bit Integer Quantization", arXiv:2305.14152. Of each row of a
matrix, or of groups of its columns, ``W = s (Q - z)``: codes ``Q`` of 4 or 8 bits and
zero points ``z`` are frozen, ``s`` is trained. What is trained here is ``s`` over its
initial value, so that one learning rate, and one perturbation, fits all scales.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from lola_flwr.model.own_tuners.on_peft import OwnConfig, OwnLayer, register


@dataclass
class PeqaConfig(OwnConfig):
    """Options of PEQA.

    Parameters
    ----------
    bits
        Bits of a weight: 4 or 8.
    group_size
        Columns that share a scale (default: all of a row's).
    """

    bits: int = 4
    group_size: int | None = None


class PeqaLayer(OwnLayer):
    """A linear map whose weights are codes, with trained scales.

    The base's weight gives way to its codes, uint8 ``[out, in]``, or ``[out, in / 2]``
    of 4 bits.

    Attributes
    ----------
    peqa_scales
        The scales, over their initial values, ``[out, groups]``.
    steps, zeros
        Initial scales, and zero points as uint8, ``[out, groups]``.
    """

    adapter_layer_names = ("peqa_scales",)
    steps: Tensor
    zeros: Tensor

    def begin(self, name: str, config: PeqaConfig) -> None:
        """Round the matrix."""
        if config.bits not in (4, 8):
            raise ValueError(f"bits={config.bits!r} is to be 4 or 8")
        width = self.in_features
        size = width if config.group_size is None else config.group_size
        if type(size) is not int or size < 1 or width % size:
            raise ValueError(
                f"group_size={size!r} is to be a whole number that divides {width}, "
                "the columns of the matrix"
            )
        matrix = self.matrix.detach()
        if not matrix.is_meta and not matrix.isfinite().all():
            raise ValueError("the matrix has weights that are not finite")
        self.bits = config.bits
        codes, zeros, steps = _rounded(
            matrix.reshape(-1, width // size, size), 2**config.bits - 1
        )
        stored = _packed(codes.flatten(1)) if config.bits == 4 else codes.flatten(1)
        self.base_layer.weight = nn.Parameter(stored, requires_grad=False)
        self.register_buffer("zeros", zeros, persistent=False)
        self.register_buffer("steps", steps, persistent=False)
        scales = nn.Parameter(torch.ones_like(steps))
        self.peqa_scales = nn.ParameterDict({name: scales})

    @property
    def matrix(self) -> Tensor:
        """The base's weight as ``[out, in]``: as it was before, or as it is rounded."""
        if not hasattr(self, "bits"):
            return super().matrix
        return self.scaled(self.steps)

    def codes_stand_for(self) -> Tensor:
        """Return the rounded weight, laid out as the base's."""
        if self.merged:
            weight: Tensor = self.base_layer.weight.detach()
            return weight
        is_turned = isinstance(self.base_layer, Conv1D)
        return self.matrix.T if is_turned else self.matrix

    def scaled(self, scales: Tensor) -> Tensor:
        """Return the matrix ``[out, in]`` that the codes are under some scales."""
        return (self.differences(scales.dtype) * scales[..., None]).flatten(1)

    def differences(self, dtype: torch.dtype) -> Tensor:
        """Return codes less zero points, ``[out, groups, columns of a group]``."""
        codes: Tensor = self.base_layer.weight.detach()
        if self.bits == 4:
            codes = _unpacked(codes, self.in_features)
        grouped = codes.reshape(*self.steps.shape, -1).to(dtype)
        return grouped.sub_(self.zeros.to(dtype)[..., None])

    def unadapted(self, inputs: Tensor) -> Tensor:
        """Map inputs ``[..., in]`` by the rounded matrix."""
        matrix = self.matrix.to(inputs.dtype)
        return functional.linear(inputs, matrix, self.base_layer.bias)

    def adapted(self, inputs: Tensor) -> Tensor:
        """Map inputs ``[..., in]`` to outputs ``[..., out]``."""
        apply: Any = _ByCodes.apply
        # Where nothing goes back, or a program is written out, it is an expression.
        records = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        bias: Tensor | None = self.base_layer.bias
        if self.steps.shape[1] > 1:
            outputs: Tensor = (
                apply(inputs, self.trained, self)
                if records
                else _mapped(inputs, self.adapted_matrix())
            )
        else:
            # A row's scale is taken out of the sum over its columns, and so is its
            # gradient: no product of matrices is needed for it.
            plain = (
                apply(inputs, None, self) if records else _mapped(inputs, self.matrix)
            )
            scales = self.trained.squeeze(1).to(plain.dtype)
            if bias is not None:
                return torch.addcmul(bias.to(plain.dtype), plain, scales)
            outputs = plain * scales
        return outputs if bias is None else outputs + bias.to(outputs.dtype)

    def adapted_matrix(self) -> Tensor:
        """Return the matrix ``[out, in]`` under the trained scales."""
        return self.scaled(self.steps * self.trained)


class _ByCodes(torch.autograd.Function):
    """A linear map by codes, which keeps no matrix of floats for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, scales: Tensor | None, layer: PeqaLayer
    ) -> Tensor:
        kept = inputs if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(kept, scales)
        ctx.layer = layer
        return _mapped(inputs, _in_place(layer, scales))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        kept, scales = ctx.saved_tensors
        of_inputs = of_scales = None
        if ctx.needs_input_grad[0]:
            of_inputs = gradient @ _in_place(ctx.layer, scales).to(gradient.dtype)
        if kept is not None:
            rows = gradient.reshape(-1, gradient.shape[-1])
            features = kept.reshape(-1, kept.shape[-1]).to(gradient.dtype)
            steps = ctx.layer.steps
            of_weights = (rows.T @ features).to(steps.dtype)
            moved = ctx.layer.differences(steps.dtype)
            moved *= of_weights.view_as(moved)
            of_scales = (moved.sum(2) * steps).to(scales.dtype)
        return of_inputs, of_scales, None


def _in_place(layer: PeqaLayer, scales: Tensor | None) -> Tensor:
    """Return the matrix ``[out, in]``, with as few copies as can be."""
    steps = layer.steps if scales is None else layer.steps * scales
    return layer.differences(steps.dtype).mul_(steps[..., None]).flatten(1)


def _mapped(inputs: Tensor, matrix: Tensor) -> Tensor:
    return functional.linear(inputs, matrix.to(inputs.dtype))


def _rounded(matrix: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round groups of weights to whole numbers between two bounds.

    Parameters
    ----------
    matrix
        The weights, ``[out, groups, columns of a group]``.
    most
        The largest code.

    Returns
    -------
    Codes as uint8 ``[out, groups, columns]``, zero points as uint8 and scales
    ``[out, groups]``. Codes and zero points follow from range and rounding, number by
    number, so that they are the same on every machine; scales are those of least
    squares.
    """
    matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    # With zero between the bounds it is a code, and rows of one value are exact.
    least = matrix.amin(2, keepdim=True).clamp(max=0)
    largest = matrix.amax(2, keepdim=True).clamp(min=0)
    steps = (largest - least) / most
    steps = torch.where(steps > 0, steps, 1.0)
    zeros = (-least / steps).round()
    codes = (matrix / steps).round().add_(zeros).clamp_(0, most)
    moved = (codes - zeros).double()
    squares = moved.square().sum(2)
    fitted = (moved * matrix).sum(2) / squares
    fitted = torch.where(squares > 0, fitted, 1.0).to(matrix.dtype)
    return codes.to(torch.uint8), zeros.squeeze(2).to(torch.uint8), fitted


def _packed(codes: Tensor) -> Tensor:
    """Put two codes of 4 bits into a byte: a row's first half, and its second."""
    half = -(-codes.shape[1] // 2)
    first, second = codes[:, :half], codes[:, half:]
    second = functional.pad(second, (0, half - second.shape[1]))
    return first | second << 4


def _unpacked(stored: Tensor, width: int) -> Tensor:
    return torch.cat((stored & 15, stored >> 4), 1)[:, :width]


register("peqa", PeqaConfig, PeqaLayer)
