"""What adapters cost: counted on the adapted modules themselves, with a few tokens.

Tuners differ too much for one formula: LoRA adds two thin products, VeRA two wide ones,
DoRA takes norms, OFT and LoHa build whole weights. PyTorch counts the operations, and
autograd says what it keeps, at two numbers of tokens, from which follows any number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from lola_flwr.arrays import Float64Array
from lola_flwr.costs.estimated import AdapterCosts, Affine
from lola_flwr.model.adapter_blocks import input_width
from lola_flwr.model.blocks import BlockPartition

_FEW, _MORE = 8, 16  # tokens
_BASE = ".base_layer."


class _Counted(NamedTuple):
    """One pass through a module and back to its input."""

    forward_flops: float
    backward_flops: float
    kept_bytes: float  # besides the input
    keeps_input: bool


def measured_costs(model: nn.Module, partition: BlockPartition) -> AdapterCosts:
    """Count what the adapters of each layer cost.

    Parameters
    ----------
    model
        A model with adapters.
    partition
        Its blocks, with their layers.
    """
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    # Most layers are alike; one is measured for all.
    known: dict[tuple[object, ...], Float64Array] = {}
    costs = []
    for block, layer in zip(partition.blocks, partition.layers, strict=True):
        alike = tuple(shapes[name] for name in (*block, *layer))
        if alike not in known:
            hosts = dict.fromkeys(n.split(_BASE)[0] for n in layer if _BASE in n)
            modules = {host: model.get_submodule(host) for host in hosts}
            few, more = _layer_costs(modules, _FEW), _layer_costs(modules, _MORE)
            per_token = (more - few) / (_MORE - _FEW)
            known[alike] = np.array([few - _FEW * per_token, per_token])
        costs.append(known[alike])
    fixed, per_token = np.moveaxis(np.array(costs), 0, -1)  # [5, N] each
    return AdapterCosts(*map(Affine, fixed, per_token))


def _layer_costs(modules: Mapping[str, nn.Module], tokens: int) -> Float64Array:
    """Add up the fields of ``AdapterCosts`` over the adapted modules of one layer."""
    total = np.zeros(5)
    # Modules side by side, as queries, keys and values, read one input.
    passed_inputs: dict[tuple[str, int], float] = {}
    trained_inputs: dict[tuple[str, int], float] = {}
    for host, module in modules.items():
        inner = module.get_submodule("base_layer")
        width = input_width(inner)
        base = _count(inner, width, tokens)
        passed = _count(module, width, tokens)
        trained = _count(module, width, tokens, train=True)
        total += [
            passed.forward_flops - base.forward_flops,
            passed.backward_flops - base.backward_flops,
            trained.backward_flops - base.backward_flops,
            passed.kept_bytes - base.kept_bytes,
            trained.kept_bytes - passed.kept_bytes,
        ]
        place, size = (host.rpartition(".")[0], width), 4.0 * tokens * width
        if passed.keeps_input and not base.keeps_input:
            passed_inputs[place] = size
        elif trained.keeps_input and not passed.keeps_input:
            trained_inputs[place] = size
    total[-2] += sum(passed_inputs.values())
    total[-1] += sum(trained_inputs.values())
    return total


def _count(
    module: nn.Module, width: int, tokens: int, *, train: bool = False
) -> _Counted:
    parameters = {
        name: p.detach().requires_grad_(train and p.requires_grad)
        for name, p in module.named_parameters()
    }
    like = next(iter(parameters.values()))
    values = torch.ones(
        1, tokens, width, dtype=like.dtype, device=like.device, requires_grad=True
    )
    constant = {
        tensor.untyped_storage().data_ptr()
        for whole in (*parameters.values(), *module.buffers())
        for tensor in _dense_parts(whole)
    }
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        for part in _dense_parts(tensor):
            storage = part.untyped_storage()
            if storage.data_ptr() not in constant:
                # Holding the storage keeps its address from being given out again.
                kept[storage.data_ptr()] = storage
        return tensor.detach()

    modes = {part: part.training for part in module.modules()}
    with torch.random.fork_rng():
        # Dropout keeps what it drops.
        module.train()
        try:
            with (
                FlopCounterMode(display=False) as forward,
                saved_tensors_hooks(keep, lambda tensor: tensor),
            ):
                output = functional_call(module, parameters, (values,))
        finally:
            for part, mode in modes.items():
                part.training = mode
    wanted = [values, *(p for p in parameters.values() if p.requires_grad)]
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(output.sum(), wanted, allow_unused=True)
    keeps_input = kept.pop(values.untyped_storage().data_ptr(), None) is not None
    return _Counted(
        forward_flops=forward.get_total_flops(),
        backward_flops=backward.get_total_flops(),
        kept_bytes=sum(storage.nbytes() for storage in kept.values()),
        keeps_input=keeps_input,
    )


def _dense_parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """Return what holds a tensor's values: a sparse one's have places, too."""
    if tensor.layout is torch.sparse_coo:
        return tensor._indices(), tensor._values()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    return (tensor,)
