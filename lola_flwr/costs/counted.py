"""What training each block costs a device, counted on the model itself.

The model's own code runs on fake tensors, which have shapes, types and a device and no
values (PyTorch's ``FakeTensorMode``): forward, and back from the loss to the block, in
training mode, with the kernels of a CPU. No weight is copied and nothing is computed,
so a model without weights (on the device ``"meta"``) will do as well. Only where what
the model does depends on values, as its choice of experts does, it runs in earnest,
with two examples and with three.

Of layers that are alike, not all are counted. At each moment of a step the bytes alive
are an affine function of how many such layers are above the block; so the peak is a
convex function, and one that meets its chord in between is the chord.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeCopyMode,
    FakeTensor,
    FakeTensorMode,
)

from lola_flwr.costs.counter import BATCHES
from lola_flwr.costs.runnable import Runnable, as_it_was, storages_of
from lola_flwr.errors import UserError, reason_of
from lola_flwr.model.backprop import train_mode
from lola_flwr.model.example import spelled
from lola_flwr.model.trace import Example

Result = TypeVar("Result")

_NEED_VALUES = (DataDependentOutputException, DynamicOutputShapeException)


def parameter_bytes(model: nn.Module) -> dict[str, int]:
    """Return what each parameter takes, with what its quantisation keeps beside it."""
    return {
        name: sum(storages_of([parameter, *_attached(vars(parameter))]).values())
        for name, parameter in model.named_parameters()
    }


def counted(
    model: nn.Module, example: Example, count: Callable[[Runnable], Result]
) -> Result:
    """Count something on a model, which stays as it is.

    Parameters
    ----------
    model
        The model.
    example
        Its input for one example or more.
    count
        Counts on what stands for the model.

    Raises
    ------
    UserError
        The model does not run on such an input, or what it does depends on values that
        it does not have.
    """
    try:
        with as_it_was(), _fake(model, example) as runnable:
            return count(runnable)
    except UserError:
        raise
    # What a model does with tensors that have no values fails in any way.
    except Exception as error:
        failed = error
    if any(parameter.is_meta for parameter in model.parameters()):
        raise _refusal(model, example, failed) from failed
    try:
        with as_it_was(), _real(model, example) as runnable:
            return count(runnable)
    except UserError:
        raise
    except Exception as error:
        raise _refusal(model, example, error) from error


def _refusal(model: nn.Module, example: Example, error: Exception) -> UserError:
    name = type(model).__name__
    reason = reason_of(error)
    if isinstance(error, _NEED_VALUES):
        return UserError(
            f"What {name} computes depends on values ({reason}), so that its costs are "
            "counted only with weights: load them."
        )
    return UserError(
        f"Costs of {name} are counted on {spelled(example)}, where it fails: {reason}; "
        "pass example=, its input for an example or more, such as a batch that your "
        "devices train on."
    )


@contextmanager
def _fake(model: nn.Module, example: Example) -> Iterator[Runnable]:
    """Give a copy of a model without values."""
    log = logging.getLogger(FakeTensorMode.__module__)
    level = log.level
    log.setLevel(logging.CRITICAL)  # what fails is told by what follows
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            yield _without_values(model, example, mode)
    finally:
        log.setLevel(level)


@contextmanager
def _real(model: nn.Module, example: Example) -> Iterator[Runnable]:
    """Give a model itself, and leave it as it was."""
    device = next(model.parameters()).device

    def repeated(count: int) -> Example:
        return _each_tensor(
            example, lambda t: t[torch.arange(count) % len(t)].to(device)
        )

    attached = [t for p in model.parameters() for t in _attached(vars(p))]
    tensors = (*model.parameters(), *model.buffers(), *attached)
    modes = {module: module.training for module in model.modules()}
    gradients = {p: p.grad for p in model.parameters()}
    train_mode(model)
    try:
        yield Runnable(model, (repeated(2), repeated(3)), tensors)
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, gradient in gradients.items():
            parameter.grad = gradient


def _without_values(
    model: nn.Module, example: Example, mode: FakeTensorMode
) -> Runnable:
    memo: dict[int, Any] = {}
    tensors = [*model.parameters(), *model.buffers()]
    for tensor in tensors:
        fake: Tensor
        if tensor.device.type == "cpu":
            # Older PyTorch has no mode for subclasses, as weights of 4 bits are.
            plain = tensor.as_subclass(Tensor).detach()
            fake = mode.from_tensor(plain, static_shapes=True)
        else:
            fake = torch.empty_strided(
                tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu"
            )
        if isinstance(tensor, nn.Parameter):
            fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = fake
    with FakeCopyMode(mode):
        twin = copy.deepcopy(model, memo)
        train_mode(twin)
        # Where weights are quantised, their scales are attributes of the parameters.
        for tensor in tensors:
            vars(memo[id(tensor)]).update(copy.deepcopy(vars(tensor), memo))
    given = [value for value in _values(example) if isinstance(value, Tensor)]
    sizes = {size for tensor in (*tensors, *given) for size in tensor.shape}
    batch = next(b for b in BATCHES if all(size % b or not size for size in sizes))
    return Runnable(
        model=twin,
        examples=(
            _each_tensor(
                example, lambda t: torch.empty((batch, *t.shape[1:]), dtype=t.dtype)
            ),
        ),
        tensors=tuple(v for v in memo.values() if isinstance(v, FakeTensor)),
        batch=batch,
        mode=mode,
    )


def _each_tensor(example: Example, change: Callable[[Tensor], Tensor]) -> Example:
    if isinstance(example, Tensor):
        return change(example)
    return {
        name: change(value) if isinstance(value, Tensor) else value
        for name, value in example.items()
    }


def _values(example: Example) -> list[Any]:
    return [example] if isinstance(example, Tensor) else list(example.values())


def _attached(attributes: Mapping[str, Any]) -> Iterator[Tensor]:
    """Find the tensors among attributes, and among theirs, modules apart."""
    for value in attributes.values():
        if isinstance(value, Tensor):
            yield value
        elif hasattr(value, "__dict__") and not isinstance(value, (nn.Module, type)):
            yield from _attached(vars(value))
