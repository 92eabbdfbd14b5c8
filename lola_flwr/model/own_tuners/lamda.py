"""LaMDA: a small square matrix is trained between frozen singular vectors.

Azizi, Kundu, Pedram, "LaMDA: Large Model Fine-Tuning via Spectrally Decomposed
Low-Dimensional Adaptation", arXiv:2406.12832. Of ``W = U diag(s) V^T`` the first ``r``
singular vectors are kept, and ``diag(s)`` between them becomes a full matrix of
``r x r``, which is trained. Here ``U`` is frozen from the start: in the paper it is
trained at first.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from lola_flwr.model.own_tuners.on_peft import OwnConfig, register
from lola_flwr.model.own_tuners.svfit import SingularLayer


@dataclass
class LamdaConfig(OwnConfig):
    """Options of LaMDA.

    Parameters
    ----------
    r
        Rows and columns of the trained matrix.
    """

    r: int = 8


class LamdaLayer(SingularLayer):
    """A linear map with a trained square matrix between its singular vectors.

    Attributes
    ----------
    lamda_core
        That matrix, ``[r, r]``.
    """

    adapter_layer_names = ("lamda_core",)

    def begin(self, name: str, config: LamdaConfig) -> None:
        """Take the matrix apart."""
        core = nn.Parameter(self.decompose("r", config.r).diag())
        self.lamda_core = nn.ParameterDict({name: core})

    def moved(self, features: Tensor) -> Tensor:
        """Map features by how far the core has moved."""
        return functional.linear(features, self.trained - self.within.diag())


register("lamda", LamdaConfig, LamdaLayer)
