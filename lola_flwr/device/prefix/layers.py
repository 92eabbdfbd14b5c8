"""The module that each block is, and the weights of what runs below one."""

from __future__ import annotations

from torch import Tensor, nn

from lola_flwr.device.prefix.samples import WITHOUT_REUSE
from lola_flwr.errors import UserError
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.model.ladder import is_ladder
from lola_flwr.model.stored_base import stored_parts


def block_modules(model: nn.Module, partition: BlockPartition) -> list[nn.Module]:
    """Return the module that each block is, or is a part of.

    Raises
    ------
    UserError
        The blocks are not one module each, or stand beside a model all of which runs.
    """
    if is_ladder(model):
        raise UserError(
            "Under tuning='ladder' every block needs what all layers of the model "
            f"give: there are none below it to be left out. {WITHOUT_REUSE}"
        )
    paths = [[name.split(".") for name in block] for block in partition.blocks]
    if len(paths) == 1:
        return [model]
    every = [path for block in paths for path in block]
    depth = 0
    while len({tuple(path[: depth + 1]) for path in every}) == 1:
        depth += 1
    modules = [{".".join(path[: depth + 1]) for path in block} for block in paths]
    names = [name for block in modules for name in block]
    if len(names) != len(paths) or len(set(names)) != len(paths):
        raise UserError(
            "The layers below a block can be run apart only where every block is one "
            f"module; these are {', '.join(sorted(set(names))[:4])}, .... "
            f"{WITHOUT_REUSE}"
        )
    return [model.get_submodule(name) for name in names]


def weights_below(
    model: nn.Module, partition: BlockPartition, block_index: int
) -> list[tuple[str, Tensor]]:
    """Return what the lower part computes with, and perhaps some more."""
    above = {
        id(tensor)
        for module in block_modules(model, partition)[block_index:]
        for tensor in (*module.parameters(), *module.buffers())
    }
    head = set(partition.head)
    return [
        (name, part)
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if id(tensor) not in above and name not in head
        for part in stored_parts(model, name)
    ]
