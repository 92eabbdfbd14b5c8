"""The blocks of a model with adapters of ``peft``: each adapter goes with its layer.

The model without its adapters is divided as in ``blocks``; what peft has added is then
told by its names. Which of several layers use a parameter that all of them register, as
TinyLoRA's do, is asked of the layers themselves.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lola_flwr.model.blocks import BlockPartition, BlocksNotFound
from lola_flwr.model.ladder import is_ladder, ladder_partition
from lola_flwr.model.running import divide, trace_of
from lola_flwr.model.trace import Example, Trace

# peft's names: "base_model.model." before those of the model, and the weights of a
# module that it wraps one level deeper than they were.
_PREFIX = "base_model.model."
_WRAPPED = re.compile(r"\.(?:base_layer|original_module)(?=\.)")
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
    example: Example | None = None,
) -> BlockPartition:
    """Divide a model, with adapters or a ladder or none, into blocks, head and rest.

    What runs before, behind and beside the blocks is seen in a forward pass on one
    example.

    Parameters
    ----------
    model
        The model. Parameters that want no gradient (``requires_grad=False``) are
        frozen; with adapters, what peft trains must want gradients.
    stack, blocks
        As for ``partition_parameters``; in the names that the model has without
        adapters.
    example
        The model's input for an example: its first argument, or its arguments by name
        (default: made up for a model of transformers; of another model, parameters are
        taken to run in the order of their names).

    Raises
    ------
    BlocksNotFound
        As ``partition_parameters``; the blocks do not run one after the other; or the
        adapters cannot be divided: see ``adapter_partition``.
    UserError
        The model cannot be run on the example.
    """
    if is_ladder(model):
        return ladder_partition(model, stack=stack, blocks=blocks, example=example)
    names = [name for name, _ in model.named_parameters()]
    if not is_adapted(model):
        own = {n for n, p in model.named_parameters() if not p.requires_grad}
        trace = trace_of(model, example)
        return divide(names, trace, stack=stack, blocks=blocks).freezing(own)
    return adapter_partition(
        names,
        _trained(model),
        buffers=[name for name, _ in model.named_buffers()],
        stack=stack,
        blocks=blocks,
        trace=trace_of(model, example, _stands_for(names)),
    )


def adapter_partition(
    names: Sequence[str],
    trained: Mapping[str, Collection[str]],
    *,
    buffers: Sequence[str] = (),
    stack: str | None = None,
    blocks: str | Sequence[str] | None = None,
    trace: Trace | None = None,
) -> BlockPartition:
    """Divide the names of a model with adapters.

    Parameters
    ----------
    names
        Names of its parameters as peft spells them, in running order.
    trained
        The trained parameters, each with the names under which layers use it.
    buffers
        Names of its buffers.
    stack, blocks
        As for ``partition_parameters``; in the names that the model has without
        adapters.
    trace
        What a forward pass has shown, in these names, too.

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
    partition = divide(base, trace, stack=stack, blocks=blocks)
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
    for name, uses in trained.items():
        places = {owner(use) for use in uses}
        place = min(places, key=str)
        if len(places) > 1:
            raise BlocksNotFound(
                f"{name} is one parameter of several layers, so that no device could "
                "train its layer alone; choose another tuner, or options that share "
                "nothing."
            )
        if place is None or place > head:
            raise BlocksNotFound(
                f"{name} would be trained, but stands neither in a block nor behind "
                "the blocks; narrow what is trained: as a regular expression, "
                "target_modules can name modules of the blocks alone, and no other "
                "option (bias='all', trainable_token_indices) may add to them."
            )
        divided[place].append(name)
    for index, block in enumerate(divided[:head]):
        if not block:
            raise BlocksNotFound(
                f"No adapter in block {index} ({partition.blocks[index][0]}, ...); "
                "let target_modules name modules that every block has."
            )
    taken = {name for block in divided for name in block}
    return BlockPartition(
        blocks=tuple(map(tuple, divided[:head])),
        head=tuple(divided[head]),
        frozen=_frozen(names, taken, buffers),
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


def frozen_names(model: nn.Module) -> tuple[str, ...]:
    """Return what is frozen in a model with adapters, as `model_partition` does."""
    return _frozen(
        [name for name, _ in model.named_parameters()],
        _trained(model),
        [name for name, _ in model.named_buffers()],
    )


def _frozen(
    names: Sequence[str], trained: Collection[str], buffers: Sequence[str]
) -> tuple[str, ...]:
    hosts = _hosts(names)
    # The base's buffers may change in training, and so may those of a module that is
    # trained in full.
    fixed = [n for n in buffers if _is_added(n, hosts) and ".modules_to_save." not in n]
    return (*(name for name in names if name not in trained), *fixed)


def _stands_for(names: Sequence[str]) -> Callable[[str], list[str]]:
    """Tell which weights of the base a parameter is, or works on.

    Those may be of a type that has no gradients, or have given way to a copy.
    """
    hosts = _hosts(names)
    base = [base_name(name) for name in names if not _is_added(name, hosts)]

    def stands_for(name: str) -> list[str]:
        if not _is_added(name, hosts):
            return [base_name(name)]
        host = next((path for path in _paths(name) if path in hosts), None)
        inside = f"{base_name(host)}." if host is not None else None
        return [weight for weight in base if inside and weight.startswith(inside)]

    return stands_for


def base_weights(names: Iterable[str], *, replaced: bool = False) -> list[str]:
    """Return which of a model's weights are those of its base.

    Parameters
    ----------
    names
        The model's weights.
    replaced
        Whether those count, too, in whose place a copy is trained.
    """
    names = list(names)
    hosts = _hosts(names)
    base = [name for name in names if not _is_added(name, hosts)]
    return [name for name in base if replaced or _REPLACED not in name]


def base_name(name: str) -> str:
    """Spell a name as in the model without adapters."""
    return _WRAPPED.sub("", name.removeprefix(_PREFIX))


def input_width(module: Any) -> int:
    """Return how many features a module reads of each token."""
    if hasattr(module, "in_features"):
        return int(module.in_features)
    # GPT-2's Conv1D holds its matrix transposed; what is left are normalisations.
    return int(module.weight.shape[0 if hasattr(module, "nf") else -1])


def _trained(model: nn.Module) -> dict[str, list[str]]:
    """List the trained parameters, each with the names under which layers use it."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            names.setdefault(id(parameter), []).append(name)
    # Where layers register a parameter that only some of them compute with, as all of
    # TinyLoRA's do, the names alone do not tell.
    shared = {key for key, aliases in names.items() if len(aliases) > 1}
    in_use = {
        f"{host}.{name}": used
        for host, module in model.named_modules()
        if shared and hasattr(module, "base_layer")
        for name, used in _in_use(module, shared).items()
    }

    def is_use(name: str) -> bool:
        # Beside the model, peft only keeps what its layers register.
        return in_use.get(name, name.startswith(_PREFIX))

    return {
        aliases[0]: [*filter(is_use, aliases)] or aliases for aliases in names.values()
    }


def _in_use(module: nn.Module, shared: Collection[int]) -> dict[str, bool]:
    """Tell which of the shared parameters a module with an adapter computes with."""
    own = {
        name: parameter
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if id(parameter) in shared
    }
    if not own:
        return {}
    inner: Any = module.get_submodule("base_layer")
    like = next(
        p for p in (*inner.parameters(), *own.values()) if p.is_floating_point()
    )
    if isinstance(inner, nn.Embedding):
        values = torch.zeros(1, 1, dtype=torch.long, device=like.device)
    else:
        size = (1, 1, input_width(inner))
        values = torch.ones(size, dtype=like.dtype, device=like.device)
    # Dropout draws random numbers.
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        output = module(values).sum()
    if not output.requires_grad:
        return dict.fromkeys(own, False)
    gradients = torch.autograd.grad(output, list(own.values()), allow_unused=True)
    return {n: grad is not None for n, grad in zip(own, gradients, strict=True)}


def _hosts(names: Iterable[str]) -> set[str]:
    """Find the modules that peft has wrapped."""
    return {
        name[: match.start()] for name in names for match in _WRAPPED.finditer(name)
    }


def _paths(name: str) -> list[str]:
    """List the modules that a parameter is in, from the innermost on."""
    parts = name.split(".")[:-1]
    return [".".join(parts[:length]) for length in range(len(parts), 0, -1)]


def _is_added(name: str, hosts: Collection[str]) -> bool:
    """Tell whether a parameter came with an adapter, not with the base model."""
    if not name.startswith(_PREFIX):
        return True
    host = next((path for path in _paths(name) if path in hosts), None)
    return host is not None and not _WRAPPED.match(name, len(host))
