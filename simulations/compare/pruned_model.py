"""A model of whose layers' matrices the least rows are left out, to train as it is.

A row of a linear map is one of its outputs. The map really is smaller meanwhile: what
is left out is neither multiplied, nor kept, nor has it a gradient; its output is zero.
Of LoRA the rows of ``B`` go with those of the matrix that it adapts, and ``A`` stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lola_flwr.arrays import IntArray
from lola_flwr.d2ft.pruning import num_pruned
from lola_flwr.errors import UserError
from lola_flwr.model.blocks import BlockPartition

_A, _B = ".lora_A.", ".lora_B."
_KEPT = "kept_rows"


def prunable(model: nn.Module, partition: BlockPartition) -> dict[str, str]:
    """Find the linear maps of the layers: of each, by which one's rows it is pruned.

    Raises
    ------
    UserError
        There is none, or adapters are trained that are not plain LoRA's.
    """
    trained = {name for block in partition.blocks for name in block}
    other = [n for n in trained if "lora_" in n and _A not in n and _B not in n]
    if other:
        raise UserError(
            f"{min(other)} is not of plain LoRA: what of it goes with a pruned row is "
            "not known; leave out of tuning_options what adds it."
        )
    in_layers = trained.union(*partition.layers)
    found = {}
    for name, module in model.named_modules():
        # A class of its own may use the weight otherwise than by calling the module.
        linear = type(module) is nn.Linear and f"{name}.weight" in in_layers
        if linear and _A not in f"{name}.":
            owner, is_b, _ = f"{name}.".partition(_B)
            found[name] = f"{owner}.base_layer" if is_b else name
    if not found:
        raise UserError(
            "No layer has a linear map (nn.Linear) to prune; choose a model that has."
        )
    return found


@contextmanager
def pruned(
    model: nn.Module, maps: Mapping[str, str], rate: float
) -> Iterator[dict[str, IntArray]]:
    """Leave the least rows of each map out, by their norm, and put them back.

    Parameters
    ----------
    model
        The model. What its smaller maps learn is lost afterwards: read it before.
    maps
        What `prunable` has found.
    rate
        Part of each map's rows that is left out.

    Yields
    ------
    The rows that are left of each parameter that is smaller, by its name.
    """
    modules = dict(model.named_modules())
    kept = {
        name: _greatest_rows(modules[name].weight, rate)
        for name in set(maps.values())
        if num_pruned(len(modules[name].weight), rate)
    }
    rows: dict[str, IntArray] = {}
    undo = []
    for name, by in maps.items():
        if by in kept:
            module = modules[name]
            whole = dict(module.named_parameters(recurse=False))
            undo.append((module, whole, module.register_forward_hook(_spread)))
            # A buffer goes wherever the module goes, fake tensors too.
            module.register_buffer(_KEPT, kept[by], persistent=False)
            for key, parameter in whole.items():
                part = nn.Parameter(
                    parameter.detach()[kept[by]], requires_grad=parameter.requires_grad
                )
                setattr(module, key, part)
                rows[f"{name}.{key}"] = kept[by].numpy(force=True)
    try:
        yield rows
    finally:
        for module, whole, hook in undo:
            hook.remove()
            delattr(module, _KEPT)
            for key, parameter in whole.items():
                setattr(module, key, parameter)


def _greatest_rows(weight: Tensor, rate: float) -> Tensor:
    """Return the rows that stay, in their order; of equal ones the first."""
    count = len(weight) - num_pruned(len(weight), rate)
    norms = weight.detach().float().norm(dim=1)
    order = torch.argsort(norms, descending=True, stable=True)
    return order[:count].sort().values


def _spread(module: Any, arguments: object, output: Tensor) -> Tensor:
    """Put outputs where they belong, among zeros."""
    whole = output.new_zeros(*output.shape[:-1], module.out_features)
    # index_copy would keep the outputs for the backward pass.
    whole[..., module.kept_rows] = output
    return whole
