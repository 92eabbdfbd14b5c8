"""Which block each adapter of a model belongs to, and what its base is called.

What stands around the layers is found as in ``blocks``: the model without its adapters
is divided, and each adapter belongs where its layer does.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

from torch import nn

from lola_flwr.model.blocks import BlockPartition, BlocksNotFound, partition_parameters

# peft's names: "base_model.model." before those of the model, and the weights of a
# module that it wraps one level deeper than they were.
_PREFIX = "base_model.model."
WRAPPED = re.compile(r"\.(?:base_layer|original_module)(?=\.)")
# In place of this one peft uses the copy that is trained.
_REPLACED = ".original_module."


def is_adapted(model: nn.Module) -> bool:
    """Tell whether a model has adapters of peft."""
    return hasattr(model, "peft_config")


def model_partition(
    model: nn.Module,
    *,
    stack: str | None = None,
    blocks: str | Sequence[str] | None = None,
) -> BlockPartition:
    """Divide a model, with or without adapters, into blocks, head and frozen rest.

    Parameters
    ----------
    model
        The model. Parameters that want no gradient (``requires_grad=False``) are
        frozen; with adapters, what peft trains must want gradients.
    stack, blocks
        As for ``partition_parameters``; in the names that the model has without
        adapters.

    Raises
    ------
    BlocksNotFound
        As ``partition_parameters``, or the adapters cannot be divided: see
        ``adapter_partition``.
    """
    names = [name for name, _ in model.named_parameters()]
    if not is_adapted(model):
        own = {n for n, p in model.named_parameters() if not p.requires_grad}
        return partition_parameters(names, stack=stack, blocks=blocks).freezing(own)
    trained: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            trained.setdefault(id(parameter), []).append(name)
    return adapter_partition(
        names,
        list(trained.values()),
        buffers=[name for name, _ in model.named_buffers()],
        stack=stack,
        blocks=blocks,
    )


def adapter_partition(
    names: Sequence[str],
    trained: Collection[Sequence[str]],
    *,
    buffers: Sequence[str] = (),
    stack: str | None = None,
    blocks: str | Sequence[str] | None = None,
) -> BlockPartition:
    """Divide the names of a model with adapters.

    Parameters
    ----------
    names
        Names of its parameters as peft spells them, in running order.
    trained
        The trained parameters, each with all its names.
    buffers
        Names of its buffers.
    stack, blocks
        As for ``partition_parameters``; in the names that the model has without
        adapters.

    Returns
    -------
    BlockPartition
        Each block is the adapter of a layer, ``layers`` has that layer's base weights.
        The head is what is trained behind the blocks. All else is frozen, and so are
        buffers that come with adapters (VeRA's random matrices).

    Raises
    ------
    BlocksNotFound
        A layer without an adapter, or a trained parameter outside of blocks and head
        or shared by several of them.
    """
    hosts = _hosts(names)
    base = {base_name(name): name for name in names if not _is_added(name, hosts)}
    partition = partition_parameters(base, stack=stack, blocks=blocks)
    in_use = base_weights(names)
    head = partition.num_blocks
    groups = [*partition.blocks, partition.head, partition.frozen]
    owners: dict[str, set[int]] = {}
    for group, members in enumerate(groups):
        for member in members:
            for path in _paths(member):
                owners.setdefault(path, set()).add(group)

    def owner(name: str) -> int | None:
        known = (owners[p] for p in _paths(base_name(name)) if p in owners)
        found = next(known, set())
        return min(found) if len(found) == 1 else None

    divided: list[list[str]] = [[] for _ in range(head + 1)]
    for aliases in trained:
        places = {owner(alias) for alias in aliases}
        place = min(places, key=str)
        if len(places) > 1:
            raise BlocksNotFound(
                f"{aliases[0]} is one parameter of several layers, so that no device "
                "could train its layer alone; choose another tuner, or options that "
                "share nothing."
            )
        if place is None or place > head:
            raise BlocksNotFound(
                f"{aliases[0]} would be trained, but stands neither in a block nor "
                "behind the blocks; narrow what is trained: as a regular expression, "
                "target_modules can name modules of the blocks alone."
            )
        divided[place].append(aliases[0])
    for index, block in enumerate(divided[:head]):
        if not block:
            raise BlocksNotFound(
                f"No adapter in block {index} ({partition.blocks[index][0]}, ...); "
                "let target_modules name modules that every block has."
            )
    taken = {name for block in divided for name in block}
    # The base's buffers may change in training, and so may those of a module that is
    # trained in full.
    fixed = [n for n in buffers if _is_added(n, hosts) and ".modules_to_save." not in n]
    return BlockPartition(
        blocks=tuple(map(tuple, divided[:head])),
        head=tuple(divided[head]),
        frozen=(*(name for name in names if name not in taken), *fixed),
        layers=tuple(
            tuple(base[name] for name in block if base[name] not in taken)
            for block in partition.blocks
        ),
        frozen_head=tuple(
            base[name]
            for name in partition.head
            if base[name] in in_use and base[name] not in taken
        ),
    )


def base_weights(names: Iterable[str]) -> list[str]:
    """Return which of a model's weights are those of its base and still in use."""
    names = list(names)
    hosts = _hosts(names)
    return [n for n in names if not _is_added(n, hosts) and _REPLACED not in n]


def base_name(name: str) -> str:
    """Spell a name as in the model without adapters."""
    return WRAPPED.sub("", name.removeprefix(_PREFIX))


def _hosts(names: Iterable[str]) -> set[str]:
    """Find the modules that peft has wrapped."""
    return {name[: match.start()] for name in names for match in WRAPPED.finditer(name)}


def _paths(name: str) -> list[str]:
    """List the modules that a parameter is in, from the innermost on."""
    parts = name.split(".")[:-1]
    return [".".join(parts[:length]) for length in range(len(parts), 0, -1)]


def _is_added(name: str, hosts: Collection[str]) -> bool:
    """Tell whether a parameter came with an adapter, not with the base model."""
    if not name.startswith(_PREFIX):
        return True
    host = next((path for path in _paths(name) if path in hosts), None)
    return host is not None and not WRAPPED.match(name, len(host))
