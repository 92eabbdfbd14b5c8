"""What training each block costs a device, measured on an example of the model's input.

For models that `lola_flwr.costs.estimated` has no formula for: convolutions, stages of
different widths, a decoder behind the blocks. The forward pass and the backward pass
down to each block are run once; PyTorch's own counter counts their operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lola_flwr.costs.estimated import BlockCosts
from lola_flwr.model.backprop import only_block_trainable
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.model.recording import require_gradients
from lola_flwr.model.trace import Example
from lola_flwr.wire.codec import codec_named
from lola_flwr.wire.payload import payload_bits


def measure_costs(
    model: nn.Module,
    partition: BlockPartition,
    example: Example,
    *,
    batch_size: int,
    codec: str = "fp32",
) -> BlockCosts:
    """Measure what each block costs, by passes forward and back for each.

    Parameters
    ----------
    model
        The model; it stays as it is. It runs in evaluation mode, so that what dropout
        keeps is not counted.
    partition
        Its blocks.
    example
        Input for some examples.
    batch_size
        Examples of a device's mini-batch, to which the costs are scaled.
    codec
        Name of the codec that gradients travel in.

    Returns
    -------
    BlockCosts
        One entry per block.

    Raises
    ------
    NoGradient
        The output does not depend on a block, as far as PyTorch has recorded.
    """
    # PyTorch's counter loads its compiler (70 MiB): not for those who have no example.
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    inputs = [example] if isinstance(example, Tensor) else list(example.values())
    batches = batch_size / len(inputs[0])
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    weights = sum(sizes.values())
    flops, memory_bytes, gradient_bytes = [], [], []
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for index in range(partition.num_blocks):
            update = partition.update_names(index)
            uploaded = sum(sizes[name] for name in update)
            with only_block_trainable(model, partition, index) as trainable:
                kept_bytes = saved_bytes(model, lambda: _scalar(model, example))
                # The counter knows matrix products, but not the CPU's fused attention.
                with (
                    FlopCounterMode(display=False) as counter,
                    sdpa_kernel(SDPBackend.MATH),
                ):
                    found = torch.autograd.grad(
                        _scalar(model, example),
                        list(trainable.values()),
                        allow_unused=True,
                    )
                missing = [
                    name
                    for name, gradient in zip(trainable, found, strict=True)
                    if gradient is None
                ]
                require_gradients(f"block {index}", partition.blocks[index], missing)
            flops.append(batches * counter.get_total_flops())
            memory_bytes.append(4.0 * (weights + uploaded) + batches * kept_bytes)
            gradient_bytes.append(4.0 * uploaded)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return BlockCosts(
        flops=np.array(flops, np.float64),
        memory_bytes=np.array(memory_bytes, np.float64),
        payload_bits=payload_bits(partition, shapes, codec_named(codec)),
        gradient_bytes=np.array(gradient_bytes, np.float64),
    )


def saved_bytes(model: nn.Module, run: Callable[[], Any]) -> int:
    """Count the bytes that autograd keeps for the backward pass, weights apart."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            # Holding the storage keeps its address from being given out again.
            storages[storage.data_ptr()] = storage
        # The tensor itself would make a cycle with its own graph, and never be freed.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in storages.values())


def _scalar(model: nn.Module, example: Example) -> Tensor:
    """Run a model forward to something that can be differentiated."""
    output = model(example) if isinstance(example, Tensor) else model(**example)
    loss: Tensor | None = getattr(output, "loss", None)
    if loss is not None:
        return loss
    first: Tensor = output if isinstance(output, Tensor) else output[0]
    return first.float().sum()
