"""Keep of each layer what goes into it alone, and run it again on the way back.

This is gradient checkpointing, in PyTorch's form that is not re-entrant, of whatever
modules the blocks are, from one on: the gradient is the same, dropout included, for
about one more forward pass from there to the loss.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial, wraps
from itertools import accumulate
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import CheckpointError, checkpoint

from lola_flwr.errors import UserError, reason_of
from lola_flwr.model.blocks import BlockPartition


@contextmanager
def recomputed_suffix(
    model: nn.Module, partition: BlockPartition, block_index: int
) -> Iterator[None]:
    """Keep little of the layers from a block on, for a ``with``.

    Parameters
    ----------
    model
        The model. Inside the ``with`` it keeps no keys and values for later tokens.
    partition
        Its blocks.
    block_index
        The first block whose layers run twice.

    Raises
    ------
    UserError
        A layer does not do the same the second time.
    """
    with ExitStack() as stack:
        stack.enter_context(_without_cache(model))
        for path in suffix_modules(model, partition, block_index):
            module = model.get_submodule(path)
            stack.enter_context(replaced_forward(module, partial(_run_twice, module)))
        try:
            yield
        except RuntimeError as error:
            if not (isinstance(error, CheckpointError) or "inplace" in str(error)):
                raise
            raise _refusal(model, reason_of(error)) from error


def suffix_modules(
    model: nn.Module, partition: BlockPartition, block_index: int
) -> list[str]:
    """Return the paths of the largest modules that are of one block, from one on."""
    layers = partition.layers or ((),) * partition.num_blocks
    names = dict.fromkeys((*partition.head, *partition.frozen_head), -1)
    for index, parts in enumerate(zip(partition.blocks, layers, strict=True)):
        names |= {name: index for part in parts for name in part}
    blocks_inside: dict[str, set[int]] = {}
    for name, index in names.items():
        for path in _containers(name):
            blocks_inside.setdefault(path, set()).add(index)

    def is_one(path: str) -> bool:
        own = blocks_inside[path]
        runs = type(model.get_submodule(path)).forward is not nn.Module.forward
        return len(own) == 1 and min(own) >= block_index and runs

    found = dict.fromkeys(path for path in blocks_inside if is_one(path))
    return [path for path in found if found.keys().isdisjoint(_containers(path))]


def _containers(path: str) -> list[str]:
    """Return the paths of the modules around a parameter or a module."""
    return ["", *accumulate(path.split("."), "{}.{}".format)][:-1] if path else []


@contextmanager
def replaced_forward(
    module: nn.Module, replacement: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Let a module run what its forward code is replaced by, for a ``with``."""
    forward, is_own = module.forward, "forward" in vars(module)
    module.forward = replacement(forward)
    try:
        yield
    finally:
        if is_own:
            module.forward = forward
        else:
            del module.forward


def _run_twice(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        leaves, shape = tree_flatten((args, kwargs), is_leaf=_is_leaf)
        places = [n for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        before = _kept_by(module)
        runs = 0

        def rerun(*tensors: Tensor) -> Any:
            nonlocal runs
            runs += 1
            if runs > 1 and _kept_by(module) != before:
                raise _refusal(module, "a run changes what it keeps beside weights")
            given = dict(zip(places, tensors, strict=True))
            args, kwargs = tree_unflatten(
                [given.get(n, leaf) for n, leaf in enumerate(leaves)], shape
            )
            return forward(*args, **kwargs)

        # Of tensors that are arguments by name PyTorch sees neither whether they were
        # changed in place since, nor which GPU's random numbers matter.
        tensors = [leaves[n] for n in places]
        return checkpoint(rerun, *tensors, use_reentrant=False, context_fn=_contexts)

    return run


def _kept_by(module: nn.Module) -> tuple[list[int], list[float]]:
    """Return what shows that a module's tensors and numbers are as they were."""
    kept = (value for part in module.modules() for value in vars(part).values())
    return (
        [tensor._version for tensor in (*module.parameters(), *module.buffers())],
        [value for value in kept if type(value) in (int, float)],
    )


def _refusal(module: nn.Module, reason: str) -> UserError:
    return UserError(
        f"{type(module).__name__} cannot be recomputed: {reason}; let devices compute "
        "in micro-batches instead (splits_batch)."
    )


def _is_leaf(value: Any) -> bool:
    return not isinstance(value, (tuple, list, dict))


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return what the two runs are in; PyTorch restores its own random numbers."""
    return nullcontext(), _random_as(random.getstate(), np.random.get_state())  # noqa: NPY002


@contextmanager
def _random_as(python: Any, numpy: Any) -> Iterator[None]:
    after = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        yield
    finally:
        random.setstate(after[0])
        np.random.set_state(after[1])  # noqa: NPY002


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Let a decoder keep no keys and values, to which a second run would add."""
    configs: list[Any] = [getattr(part, "config", None) for part in model.modules()]
    keeping = [c for c in configs if getattr(c, "use_cache", None) is True]
    for config in keeping:
        config.use_cache = False
    try:
        yield
    finally:
        for config in keeping:
            config.use_cache = True
