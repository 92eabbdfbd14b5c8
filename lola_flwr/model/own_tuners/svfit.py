"""SVFit: the singular values of each matrix are trained, its singular vectors stay.

Sun, Wei, Wu, Shi, He, Ma, Xie, Yang, "SVFit: Parameter-Efficient Fine-Tuning of Large
Pre-Trained Models Using Singular Values", arXiv:2409.05926. Of ``W = U diag(s) V^T``
the ``k`` largest of ``s`` are trained, and the rest of ``W`` is frozen: a matrix
uploads ``k`` numbers.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

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
class SvfitConfig(OwnConfig):
    """Options of SVFit.

    Parameters
    ----------
    k
        Singular values of each matrix that are trained, the largest (default: all).
    """

    k: int | None = None


class SingularLayer(OwnLayer):
    """A linear map with a trained core between its first singular vectors.

    The map is ``W + U (core - diag(s)) V^T``, with ``core = diag(s)`` to begin with;
    of all singular vectors it is ``U core V^T``, which takes fewer products.

    Attributes
    ----------
    left, right
        ``U`` as ``[out, k]`` and ``V^T`` as ``[k, in]``; frozen.
    within
        What of the core is in ``W``, ``[k]``: ``s``, or zeros where ``W`` is left out.
    """

    left: Tensor
    right: Tensor
    within: Tensor

    @property
    def is_whole(self) -> bool:
        """Whether it has all singular vectors, and so no use for the matrix."""
        return len(self.within) == min(self.matrix.shape)

    def decompose(self, option: str, count: int) -> Tensor:
        """Keep the first of the matrix's singular vectors, and return their values.

        Parameters
        ----------
        option, count
            How many, and the option that says so.

        Raises
        ------
        ValueError
            There are fewer.
        """
        most = min(self.matrix.shape)
        check_count(option, count, most, "singular values")
        # In float32 at least: LAPACK has no half types.
        matrix = self.matrix.detach()
        matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        # A slice would hold on to the rest.
        first: Tensor = values[:count].clone()
        self.register_buffer("left", left[:, :count].clone(), persistent=False)
        self.register_buffer("right", right[:count].clone(), persistent=False)
        within = torch.zeros_like(first) if count == most else first.clone()
        self.register_buffer("within", within, persistent=False)
        return first

    @abstractmethod
    def moved(self, features: Tensor) -> Tensor:
        """Map features ``[..., k]`` by the core, less what of it is in ``W``."""

    def adapted(self, inputs: Tensor) -> Tensor:
        """Map inputs ``[..., in]`` to outputs ``[..., out]``."""
        features = functional.linear(inputs.to(self.right.dtype), self.right)
        moved = self.moved(features)
        if not self.is_whole:
            base: Tensor = self.base_layer(inputs)
            return base + functional.linear(moved, self.left).to(base.dtype)
        bias: Tensor | None = self.base_layer.bias
        bias = None if bias is None else bias.to(moved.dtype)
        return functional.linear(moved, self.left, bias).to(inputs.dtype)

    def adapted_matrix(self) -> Tensor:
        """Return the matrix ``[out, in]``."""
        moved: Tensor = self.left @ self.moved(self.right.T).T
        return moved if self.is_whole else self.matrix + moved


class SvfitLayer(SingularLayer):
    """A linear map whose largest singular values are trained.

    Attributes
    ----------
    svfit_values
        They, ``[k]``.
    """

    adapter_layer_names = ("svfit_values",)

    def begin(self, name: str, config: SvfitConfig) -> None:
        """Take the matrix apart."""
        count = min(self.matrix.shape) if config.k is None else config.k
        values = nn.Parameter(self.decompose("k", count))
        self.svfit_values = nn.ParameterDict({name: values})

    def moved(self, features: Tensor) -> Tensor:
        """Scale features by how far the singular values have moved."""
        return features * (self.trained - self.within)


register("svfit", SvfitConfig, SvfitLayer)
