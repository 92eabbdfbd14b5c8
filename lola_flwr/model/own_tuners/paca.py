"""PaCA: some columns of each matrix are trained, and no adapter runs beside it.

Woo, Namkung, Lee, Jeong, Kim, Jeon, "PaCA: Partial Connection Adaptation for Efficient
Fine-Tuning", arXiv:2503.01905. A column of a matrix ``W`` belongs to one feature of its
input, so its gradient needs that feature alone: of the input ``x`` of a matrix in the
trained block ``x[..., columns]`` is kept, and of one above it nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lola_flwr.model.own_tuners.on_peft import (
    OwnConfig,
    OwnLayer,
    check_count,
    register,
)


@dataclass
class PacaConfig(OwnConfig):
    """Options of PaCA.

    Parameters
    ----------
    r
        Columns of each matrix that are trained, chosen at random.
    """

    r: int = 8


class PacaLayer(OwnLayer):
    """A linear map of which some columns are trained.

    Attributes
    ----------
    paca_columns
        The trained columns, ``[out, r]``.
    chosen
        Which they are, ascending, ``[r]``. The base's own stay as they were, and
        are replaced for as long as the map is computed.
    """

    adapter_layer_names = ("paca_columns",)
    chosen: Tensor

    def begin(self, name: str, config: PacaConfig) -> None:
        """Choose columns, by PyTorch's random numbers, and take them out."""
        check_count("r", config.r, self.in_features, "columns")
        chosen = torch.randperm(self.in_features)[: config.r].sort().values
        # A model without values gets them later, but which are chosen is known now.
        on_base = chosen.to(self.matrix.device)
        columns = nn.Parameter(self.matrix.detach()[:, on_base].clone())
        self.paca_columns = nn.ParameterDict({name: columns})
        is_known = not self.matrix.is_meta
        self.register_buffer("chosen", on_base if is_known else chosen, False)

    def adapted(self, inputs: Tensor) -> Tensor:
        """Map inputs ``[..., in]`` to outputs ``[..., out]``."""
        if torch.compiler.is_compiling():
            # A program that is written out holds no weights that come and go.
            moved = self.trained - self.matrix[:, self.chosen]
            base: Tensor = self.base_layer(inputs)
            return base + functional.linear(inputs[..., self.chosen], moved)
        apply: Any = _PartlyTrained.apply
        output: Tensor = apply(
            inputs, self.trained, self.matrix, self.base_layer.bias, self.chosen
        )
        return output

    def adapted_matrix(self) -> Tensor:
        """Return the matrix ``[out, in]`` with the trained columns."""
        return self.matrix.index_copy(
            1, self.chosen, self.trained.to(self.matrix.dtype)
        )


class _PartlyTrained(torch.autograd.Function):
    """A linear map by a matrix, some of whose columns are given apart."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        columns: Tensor,
        matrix: Tensor,
        bias: Tensor | None,
        chosen: Tensor,
    ) -> Tensor:
        kept = inputs.index_select(-1, chosen) if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(kept, columns, matrix, chosen)
        with _replaced(matrix, columns, chosen):
            return functional.linear(inputs, matrix, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        kept, columns, matrix, chosen = ctx.saved_tensors
        of_inputs = of_columns = of_bias = None
        if ctx.needs_input_grad[0]:
            with _replaced(matrix, columns, chosen):
                of_inputs = gradient @ matrix.to(gradient.dtype)
        if kept is not None:
            rows = gradient.reshape(-1, gradient.shape[-1])
            features = kept.reshape(-1, kept.shape[-1]).to(gradient.dtype)
            # Twice as fast as the product of the two that is not turned.
            of_columns = (features.T @ rows).T.to(columns.dtype)
        if ctx.needs_input_grad[3]:
            of_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0)
        return of_inputs, of_columns, None, of_bias, None


@contextmanager
def _replaced(matrix: Tensor, columns: Tensor, chosen: Tensor) -> Iterator[None]:
    """Let a frozen matrix have other columns for a ``with``."""
    # Past autograd, which is to know the matrix as the constant that it is.
    values = matrix.data
    own = values.index_select(1, chosen)
    values.index_copy_(1, chosen, columns.data.to(values.dtype))
    try:
        yield
    finally:
        values.index_copy_(1, chosen, own)


register("paca", PacaConfig, PacaLayer)
