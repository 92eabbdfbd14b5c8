"""A model that runs to be counted: one pass after the other, for every block."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from itertools import groupby
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from lola_flwr.arrays import Float64Array
from lola_flwr.costs.counter import Counter, Pass, TwoPasses
from lola_flwr.costs.operations import dense_parts
from lola_flwr.errors import UserError
from lola_flwr.model.activations import Activations, kept_suffix
from lola_flwr.model.backprop import block_gradient
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.model.trace import Example

_logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# Stands for the name of a model's first argument.
_FIRST = ""


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
    mode
        What makes it fake.
    """

    model: nn.Module
    examples: tuple[Example, ...]
    tensors: tuple[Tensor, ...]
    batch: int = 0
    mode: FakeTensorMode | None = None

    def later(self, count: Callable[[], Result]) -> Callable[[], Result]:
        """Return what counts something on it when that is asked for, and once.

        A model that runs in earnest is the caller's, and is counted on now.
        """
        mode = self.mode
        if mode is None:
            counts = count()
            return lambda: counts

        @cache
        def counted_once() -> Result:
            with as_it_was(), mode:
                return count()

        return counted_once

    def held_bytes(self) -> int:
        """Return what the model's tensors take."""
        return sum(storages_of(self.tensors).values())

    def count(
        self,
        partition: BlockPartition,
        batch_size: int,
        *,
        together: bool = False,
        recompute: bool = False,
        activations: Activations = "exact",
    ) -> Counts:
        """Count the steps that train each block, with a batch of that size.

        If ``together``, those that train each block and all behind it; if
        ``recompute``, those in which the layers from there on run twice, else those in
        which they keep ``activations``.
        """
        last = partition.num_blocks - 1
        run = partial(self.run, partition, recompute=recompute, activations=activations)

        def blocks(first: int) -> Sequence[int]:
            return range(first, last + 1) if together else [first]

        # Some layers prepare something when they are first called.
        run(None)
        passes = {last: run([last])}
        below_bytes = [
            passes[last].peak_bytes(size, before=last) for size in (1, batch_size)
        ]
        groups = self._alike(passes[last], partition)
        rows: dict[int, Float64Array] = {}

        def row(block: int) -> Float64Array:
            if block not in rows:
                done = passes.pop(block, None) or run(blocks(block))
                peaks = [
                    done.peak_bytes(batch_size),
                    done.peak_bytes(1, gradients=False),
                    done.peak_bytes(batch_size, gradients=False),
                ]
                rows[block] = np.array([*done.flops, *peaks], np.float64)
            return rows[block]

        for low, high in groups:
            fill(rows, row, low, high)
        table = np.array([rows[block] for block in range(partition.num_blocks)])
        return Counts(table[:, :-3], *table[:, -3:].T, *below_bytes)

    def count_twice(
        self, partition: BlockPartition, batch_size: int, *, together: bool = False
    ) -> Counts | None:
        """Count the steps whose layers run twice; None, and why, if they cannot."""
        try:
            return self.count(partition, batch_size, together=together, recompute=True)
        except UserError as error:
            _logger.warning("No device recomputes what it could not keep: %s", error)
            return None

    def run(
        self,
        partition: BlockPartition,
        blocks: Sequence[int] | None,
        *,
        recompute: bool = False,
        activations: Activations = "exact",
    ) -> Pass | TwoPasses:
        """Count one pass: forward, and back to the first of blocks unless None."""
        with (
            kept_suffix(self.model, partition, blocks[0], activations, recompute)
            if blocks
            else nullcontext()
        ):
            passes = [self._run(partition, blocks, given) for given in self.examples]
        return passes[0] if len(passes) == 1 else TwoPasses(*passes)

    def _run(
        self,
        partition: BlockPartition,
        blocks: Sequence[int] | None,
        example: Example,
    ) -> Pass:
        counter = Counter(self.owners(partition), self.batch)
        batch = batch_of(example)

        def loss_function(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
            loss = loss_on(model, batch)
            counter.tracing = False
            return loss

        with counter:
            counter.note(v for v in batch.values() if isinstance(v, Tensor))
            if blocks is None:
                with torch.no_grad():
                    loss_function(self.model, batch)
                return counter.result()
            found = block_gradient(
                self.model, partition, blocks, batch, loss_function=loss_function
            )
        return counter.result(found.gradients.values())

    def owners(self, partition: BlockPartition) -> dict[int, int]:
        """Map the storage of each of the model's tensors to its block, or to -1."""
        owners = dict.fromkeys(storages_of(self.tensors), -1)
        parameters = dict(self.model.named_parameters())
        layers = partition.layers or ((),) * partition.num_blocks
        for index, names in enumerate(zip(partition.blocks, layers, strict=True)):
            own = [parameters[name] for part in names for name in part]
            owners.update(dict.fromkeys(storages_of(own), index))
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


def fill(
    rows: dict[int, Float64Array],
    row: Callable[[int], Float64Array],
    low: int,
    high: int,
) -> None:
    """Find the rows of blocks between two, where they may lie on a straight line.

    Parameters
    ----------
    rows
        Rows by block, to which they are added.
    row
        Counts a block's row, or finds it there.
    low, high
        The two blocks.
    """
    step = row(high) - row(low)
    if high - low < 2:
        return
    middle = (low + high) // 2
    rise = row(middle) - row(low)
    if np.array_equal(rise * (high - low), step * (middle - low)):
        for block in range(low + 1, high):
            rows[block] = row(low) + step * (block - low) / (high - low)
    else:
        fill(rows, row, low, middle)
        fill(rows, row, middle, high)


@contextmanager
def as_it_was() -> Iterator[None]:
    """Leave random numbers as they were; some models draw their masks with NumPy."""
    state = np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        np.random.set_state(state)  # noqa: NPY002


def batch_of(example: Example) -> dict[str, Any]:
    """Return an example as a batch; what says how many there are comes first."""
    inputs = example if isinstance(example, Mapping) else {_FIRST: example}
    return dict(sorted(inputs.items(), key=lambda i: not isinstance(i[1], Tensor)))


def loss_on(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
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


def storages_of(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Map the storages of tensors to their sizes, bytes."""
    parts = [part for tensor in tensors for part in dense_parts(tensor)]
    storages = [part.untyped_storage() for part in parts]
    return {storage._cdata: storage.nbytes() for storage in storages}
