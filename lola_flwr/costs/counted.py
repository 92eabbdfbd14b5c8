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
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeCopyMode,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._pytree import tree_leaves

from lola_flwr.arrays import Float64Array
from lola_flwr.costs.counter import BATCHES, Counter, Pass, TwoPasses
from lola_flwr.costs.operations import dense_parts
from lola_flwr.errors import UserError, reason_of
from lola_flwr.model.backprop import block_gradient, train_mode
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.model.example import spelled
from lola_flwr.model.trace import Example

Result = TypeVar("Result")

# Stands for the name of a model's first argument.
_FIRST = ""

_NEED_VALUES = (DataDependentOutputException, DynamicOutputShapeException)


@dataclass(frozen=True, eq=False)
class Counts:
    """What was counted of the steps that train each block.

    Parameters
    ----------
    flops
        Operations: coefficients of the powers of the batch size, shape [N, powers].
    whole_bytes
        What the step takes besides weights at its peak, shape [N].
    one_bytes, pass_bytes
        The same without the gradients of block and head, of one example and of all,
        shape [N] each.
    below_one_bytes, below_bytes
        The same before the last block runs, where nothing is kept.
    """

    flops: Float64Array
    whole_bytes: Float64Array
    one_bytes: Float64Array
    pass_bytes: Float64Array
    below_one_bytes: float
    below_bytes: float


@dataclass(frozen=True, eq=False)
class Runnable:
    """A model that runs to be counted.

    Parameters
    ----------
    model
        The model, in training mode: a copy without values, or itself.
    examples
        Its input: for a batch of `BATCHES` if it is fake, else for two and for three.
    tensors
        All that the model holds: parameters, buffers, and what a quantisation keeps
        beside them.
    batch
        The fake examples; 0: they are real.
    """

    model: nn.Module
    examples: tuple[Example, ...]
    tensors: tuple[Tensor, ...]
    batch: int = 0

    def held_bytes(self) -> int:
        """Return what the model's tensors take."""
        return sum(_storages(self.tensors).values())

    def count(self, partition: BlockPartition, batch_size: int) -> Counts:
        """Count the steps that train each block, with a batch of that size."""
        last = partition.num_blocks - 1
        # Some layers prepare something when they are first called.
        self.run(partition, None)
        passes = {last: self.run(partition, last)}
        below_bytes = [
            passes[last].peak_bytes(size, before=last) for size in (1, batch_size)
        ]
        groups = self._alike(passes[last], partition)
        rows: dict[int, Float64Array] = {}

        def row(block: int) -> Float64Array:
            if block not in rows:
                done = passes.pop(block, None) or self.run(partition, block)
                peaks = [
                    done.peak_bytes(batch_size),
                    done.peak_bytes(1, gradients=False),
                    done.peak_bytes(batch_size, gradients=False),
                ]
                rows[block] = np.array([*done.flops, *peaks], np.float64)
            return rows[block]

        def fill(low: int, high: int) -> None:
            """Find the rows between two blocks, where all are alike."""
            step = row(high) - row(low)
            if high - low < 2:
                return
            middle = (low + high) // 2
            rise = row(middle) - row(low)
            if np.array_equal(rise * (high - low), step * (middle - low)):
                for block in range(low + 1, high):
                    rows[block] = row(low) + step * (block - low) / (high - low)
            else:
                fill(low, middle)
                fill(middle, high)

        for low, high in groups:
            fill(low, high)
        table = np.array([rows[block] for block in range(partition.num_blocks)])
        return Counts(table[:, :-3], *table[:, -3:].T, *below_bytes)

    def run(
        self, partition: BlockPartition, block_index: int | None
    ) -> Pass | TwoPasses:
        """Count one pass: forward, and back to a block unless it is None."""
        passes = [
            self._run(partition, block_index, example) for example in self.examples
        ]
        return passes[0] if len(passes) == 1 else TwoPasses(*passes)

    def _run(
        self, partition: BlockPartition, block_index: int | None, example: Example
    ) -> Pass:
        counter = Counter(self._owners(partition), self.batch)
        inputs = example if isinstance(example, Mapping) else {_FIRST: example}
        # What says how many examples there are comes first.
        batch = dict(sorted(inputs.items(), key=lambda i: not isinstance(i[1], Tensor)))

        def loss_function(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
            loss = _scalar(model, batch)
            counter.tracing = False
            return loss

        with counter:
            counter.note(v for v in batch.values() if isinstance(v, Tensor))
            if block_index is None:
                with torch.no_grad():
                    loss_function(self.model, batch)
                return counter.result()
            found = block_gradient(
                self.model, partition, block_index, batch, loss_function=loss_function
            )
        return counter.result(found.gradients.values())

    def _owners(self, partition: BlockPartition) -> dict[int, int]:
        """Map the storage of each of the model's tensors to its block, or to -1."""
        owners = dict.fromkeys(_storages(self.tensors), -1)
        parameters = dict(self.model.named_parameters())
        layers = partition.layers or ((),) * partition.num_blocks
        for index, names in enumerate(zip(partition.blocks, layers, strict=True)):
            own = [parameters[name] for part in names for name in part]
            owners.update(dict.fromkeys(_storages(own), index))
        return owners

    def _alike(
        self, done: Pass | TwoPasses, partition: BlockPartition
    ) -> list[tuple[int, int]]:
        """Return the first and the last block of each run of blocks that are alike.

        These run the same operations on the same shapes, and train the same shapes; so
        does the block before each. (What goes into the first of them may be kept by
        others, as what embeddings give is.)
        """
        blocks = range(partition.num_blocks)
        if list(done.starts) != list(blocks):
            return [(block, block) for block in blocks]
        parameters = dict(self.model.named_parameters())

        def kind(block: int) -> tuple[Any, ...]:
            trained = [parameters[name] for name in partition.blocks[block]]
            return (done.traces[block], *((p.shape, p.dtype) for p in trained))

        kinds = [None, *map(kind, blocks)]
        runs = [list(run) for _, run in groupby(blocks, lambda n: kinds[n : n + 2])]
        return [(run[0], run[-1]) for run in runs]


def parameter_bytes(model: nn.Module) -> dict[str, int]:
    """Return what each parameter takes, with what its quantisation keeps beside it."""
    return {
        name: sum(_storages([parameter, *_attached(vars(parameter))]).values())
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
        with _as_it_was(), _fake(model, example) as runnable:
            return count(runnable)
    except UserError:
        raise
    # What a model does with tensors that have no values fails in any way.
    except Exception as error:
        failed = error
    if any(parameter.is_meta for parameter in model.parameters()):
        raise _refusal(model, example, failed) from failed
    try:
        with _as_it_was(), _real(model, example) as runnable:
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
def _as_it_was() -> Iterator[None]:
    """Leave random numbers as they were; some models draw their masks with NumPy."""
    state = np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        np.random.set_state(state)  # noqa: NPY002


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


def _scalar(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Run a model forward to something that can be differentiated."""
    output = model(batch[_FIRST]) if _FIRST in batch else model(**batch)
    loss: Tensor | None = getattr(output, "loss", None)
    if loss is not None:
        return loss
    # What models of transformers return besides is for later calls.
    outputs = output[0] if hasattr(output, "to_tuple") else output
    sums = [
        leaf.float().sum()
        for leaf in tree_leaves(outputs)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]
    return torch.stack(sums).sum() if len(sums) > 1 else sums[0]


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Map the storages of tensors to their sizes, bytes."""
    parts = [part for tensor in tensors for part in dense_parts(tensor)]
    storages = [part.untyped_storage() for part in parts]
    return {storage._cdata: storage.nbytes() for storage in storages}


def _attached(attributes: Mapping[str, Any]) -> Iterator[Tensor]:
    """Find the tensors among attributes, and among theirs, modules apart."""
    for value in attributes.values():
        if isinstance(value, Tensor):
            yield value
        elif hasattr(value, "__dict__") and not isinstance(value, (nn.Module, type)):
            yield from _attached(vars(value))
