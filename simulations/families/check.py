"""What is checked of one model: blocks, head, gradients, prefix cache, saving."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lola_flwr.device.prefix import ActivationCache, reused_prefix
from lola_flwr.errors import UserError
from lola_flwr.model.backprop import Batch, LossFunction, block_gradient
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.model.saved_adapters import save_model

GRADIENT_TOLERANCE = 1e-5
SAVED_TOLERANCE = 1e-6
_CACHE_BYTES = 1 << 26
# In a layer of some stack.
_IN_A_LAYER = re.compile(r"(^|.*\.)\d+\..+\..+")


class Wrong(Exception):
    """A check failed: the library is wrong about this model."""


class NotDifferentiable(Exception):
    """The model itself cannot be differentiated in this mode."""


def check_partition(model: nn.Module, partition: BlockPartition, batch: Batch) -> None:
    """Check blocks and head by changing weights, one parameter after the other.

    What changes a block's output from outside feeds the blocks, and may be no head;
    what does not, but changes the model's output, must be, unless it is a layer of
    another stack or wants no gradient. A block must change the outputs of those behind
    it, and of no others.

    Raises
    ------
    Wrong
        A parameter stands in the wrong part.
    """
    parameters = dict(model.named_parameters())
    if sorted([*partition.trainable, *partition.frozen]) != sorted(parameters):
        raise Wrong("blocks, head and frozen are not all parameters, once each")
    modules = [modules_of(model, block) for block in partition.blocks]
    before = _outputs(model, modules, batch)

    def changed_by(names: Iterable[str]) -> list[bool]:
        """Tell for each block, and last for the model, whether its output changes."""
        with _changed([parameters[name] for name in names]):
            after = _outputs(model, modules, batch)
        return [not torch.equal(*pair) for pair in zip(before, after, strict=True)]

    for index, block in enumerate(partition.blocks):
        *blocks, output = changed_by(block)
        if blocks != [other >= index for other in range(partition.num_blocks)]:
            raise Wrong(f"block {index} feeds blocks {np.flatnonzero(blocks).tolist()}")
        if not output:
            raise Wrong(f"the output does not depend on block {index}")
    for name in partition.head:
        *blocks, _ = changed_by([name])
        if any(blocks):
            raise Wrong(f"{name} is in the head, but feeds the blocks")
    for name in partition.frozen:
        if _IN_A_LAYER.fullmatch(name) or not parameters[name].requires_grad:
            continue
        *blocks, output = changed_by([name])
        if output and not any(blocks):
            raise Wrong(f"{name} runs behind the blocks, but is frozen")


def check_gradients(
    model: nn.Module,
    partition: BlockPartition,
    batch: Batch,
    loss_function: LossFunction,
) -> None:
    """Check first, middle and last block against full back-propagation.

    In evaluation, where the model itself can be differentiated so, and in training with
    the same dropout.

    Raises
    ------
    Wrong
        A gradient differs by more than ``GRADIENT_TOLERANCE``.
    NotDifferentiable
        The model cannot be trained at all.
    """
    for training in (True, False):
        _set_mode(model, training)
        try:
            expected = _full_gradient(model, batch, loss_function)
        except NotDifferentiable:
            if training:
                raise
            continue
        for index in some_blocks(partition):
            found = _block_gradient(model, partition, index, batch, loss_function)
            mode = "training" if training else "evaluation"
            _compare(found, expected, f"{mode}, block {index}")


def check_prefix_cache(
    model: nn.Module,
    partition: BlockPartition,
    batch: Batch,
    loss_function: LossFunction,
) -> str:
    """Check the same gradients with the layers below out of a cache.

    It is filled by the batch itself (cold, then warm), and by other batches of its
    samples. In evaluation they are compared with full back-propagation; in training,
    where dropout is off below the block, with those of the cold cache.

    Returns
    -------
    Why the library refuses to run this model's layers apart; "" if it does.

    Raises
    ------
    Wrong
        A gradient differs by more than ``GRADIENT_TOLERANCE``.
    """
    for training in (False, True):
        _set_mode(model, training)
        expected = None
        if not training:
            with suppress(NotDifferentiable):
                expected = _full_gradient(model, batch, loss_function)
            if expected is None:
                continue
        for index in some_blocks(partition)[1:]:
            own, others = (ActivationCache(_CACHE_BYTES) for _ in range(2))

            def gradient(
                of: Batch, cache: ActivationCache, index: int = index
            ) -> dict[str, Tensor]:
                with reused_prefix(model, partition, index, cache):
                    return _block_gradient(model, partition, index, of, loss_function)

            try:
                cold = gradient(batch, own)
                warm = gradient(batch, own)
                for samples in ([2, 0], [1]):
                    gradient({n: v[samples] for n, v in batch.items()}, others)
                mixed = gradient(batch, others)
            except UserError as error:
                return one_line(error)
            kept = expected or cold
            _compare(cold, kept, f"cold cache, block {index}")
            if not (own.hits and others.hits):
                return "Nothing is found again: each pass changes the layers below."
            _compare(warm, kept, f"warm cache, block {index}")
            _compare(mixed, kept, f"cache of other batches, block {index}")
    return ""


def check_saving(model: Any, batch: Batch) -> None:
    """Check that the model, saved in float32 and loaded anew, gives the same outputs.

    Raises
    ------
    Wrong
        They differ by more than ``SAVED_TOLERANCE``, in the model's own precision.
    """
    dtype = model.dtype
    model.float()
    with tempfile.TemporaryDirectory() as directory:
        save_model(model, Path(directory))
        loaded = type(model).from_pretrained(directory).to(dtype)
    model.to(dtype)
    pairs = zip(_forward(model, batch), _forward(loaded, batch), strict=True)
    difference = max(_largest(old - new) for old, new in pairs)
    if not difference <= SAVED_TOLERANCE:
        raise Wrong(f"saved and loaded, outputs differ by {difference:.1e}")


def modules_of(model: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    """Return the modules all of whose parameters have these names."""
    inside = {id(parameter) for parameter in map(model.get_parameter, names)}
    return [
        module
        for module in model.modules()
        if (own := {id(parameter) for parameter in module.parameters()})
        and own <= inside
    ]


def some_blocks(partition: BlockPartition) -> list[int]:
    """Return the first block, one in the middle and the last."""
    return sorted({0, partition.num_blocks // 2, partition.num_blocks - 1})


def one_line(error: BaseException) -> str:
    """Return what an error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def seed_everything() -> None:
    """Seed what models draw from: some mask their input with NumPy's numbers."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002


def _set_mode(model: nn.Module, training: bool) -> None:
    """Let a model train, or not, as if it had never run before."""
    model.train()  # LeViT forgets here what it keeps from one evaluation to the next
    model.train(training)
    seed_everything()


def _block_gradient(
    model: nn.Module,
    partition: BlockPartition,
    index: int,
    batch: Batch,
    loss_function: LossFunction,
) -> dict[str, Tensor]:
    _set_mode(model, model.training)
    result = block_gradient(model, partition, index, batch, loss_function=loss_function)
    return result.gradients


def _full_gradient(
    model: nn.Module, batch: Batch, loss_function: LossFunction
) -> dict[str, Tensor]:
    _set_mode(model, model.training)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    try:
        gradients = torch.autograd.grad(
            loss_function(model, batch),
            list(parameters.values()),
            allow_unused=True,
            materialize_grads=True,
        )
    # Whatever a model has against it.
    except Exception as error:
        raise NotDifferentiable(one_line(error)) from error
    return dict(zip(parameters, gradients, strict=True))


def _compare(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str
) -> None:
    scale = max(_largest(expected[name]) for name in found)
    difference = max(_largest(found[name] - expected[name]) for name in found)
    if not scale > 0 or not difference <= GRADIENT_TOLERANCE * scale:
        raise Wrong(f"{what}: gradient of {scale:.1e} is off by {difference:.1e}")


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def _outputs(
    model: nn.Module, groups: Sequence[Sequence[nn.Module]], batch: Batch
) -> list[Tensor]:
    """Run the model; return what each group of modules, and last the model, gave."""
    given: list[list[Tensor]] = [[] for _ in groups]
    handles = [
        module.register_forward_hook(
            lambda _, args, output, kept=kept: kept.extend(_tensors(output))
        )
        for group, kept in zip(groups, given, strict=True)
        for module in group
    ]
    try:
        given.append(_forward(model, batch))
    finally:
        for handle in handles:
            handle.remove()
    if not all(given):
        raise Wrong(f"no module of block {given.index([])} is ever called")
    return [torch.cat([each.flatten() for each in kept]) for kept in given]


def _forward(model: nn.Module, batch: Batch) -> list[Tensor]:
    _set_mode(model, False)
    with torch.no_grad():
        return list(_tensors(model(**batch)))


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the floating-point tensors in what a module returns."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value.nan_to_num()
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _tensors(each)


@contextmanager
def _changed(parameters: Sequence[Tensor]) -> Iterator[None]:
    before = [parameter.detach().clone() for parameter in parameters]
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=noise))
        yield
        for parameter, values in zip(parameters, before, strict=True):
            parameter.copy_(values)
