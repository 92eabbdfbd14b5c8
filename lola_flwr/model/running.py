"""Blocks in the order in which they run, as a traced forward pass shows it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace

from torch import nn

from lola_flwr.model.blocks import BlockPartition, BlocksNotFound, partition_parameters
from lola_flwr.model.example import example_of
from lola_flwr.model.trace import Example, Trace, traced


def trace_of(
    model: nn.Module,
    example: Example | None,
    stands_for: Callable[[str], Collection[str]] = lambda name: (name,),
) -> Trace | None:
    """Trace a model on an example, or on one that is made up.

    Parameters
    ----------
    model, example, stands_for
        As for ``traced``. Without an example one is made up for a model of
        transformers; of another nothing is known.

    Returns
    -------
    The trace; None where there is nothing to run the model on.
    """
    if example is None:
        if not hasattr(model, "main_input_name"):
            return None
        example = example_of(model)
    return traced(model, example, stands_for)


def divide(
    names: Iterable[str],
    trace: Trace | None,
    *,
    stack: str | None = None,
    blocks: str | Sequence[str] | None = None,
) -> BlockPartition:
    """Divide parameter names by what a trace has shown of them.

    What runs where no gradient reaches it, as what chooses tokens or experts may, stays
    frozen.

    Parameters
    ----------
    names
        Names of the trace; without a trace, names in running order.
    trace
        What a forward pass has shown.
    stack, blocks
        As for ``partition_parameters``.

    Raises
    ------
    BlocksNotFound
        As for ``partition_parameters``; or the blocks do not run one after the other,
        or not at all.
    """
    if trace is None:
        return partition_parameters(names, stack=stack, blocks=blocks)
    partition = partition_parameters(
        names, stack=stack, blocks=blocks, behind=trace.behind
    )
    partition = replace(partition, blocks=_in_running_order(partition.blocks, trace))
    return partition.freezing(trace.unrecorded())


def _in_running_order(
    blocks: Sequence[Sequence[str]], trace: Trace
) -> tuple[tuple[str, ...], ...]:
    """Sort blocks from the input to the output; refuse those that are no chain."""
    needed = trace.behind(())
    origins = [trace.feeding(block) for block in blocks]
    for index, (block, origin) in enumerate(zip(blocks, origins, strict=True)):
        if needed.isdisjoint(block) or origin.isdisjoint(block):
            raise BlocksNotFound(
                f"The model's output does not depend on block {index} ({block[0]}, "
                "...), on the example that it was tried on; name other blocks with "
                "stack=... or blocks='...'."
            )
    below = [
        {j for j, other in enumerate(blocks) if j != i and not origin.isdisjoint(other)}
        for i, origin in enumerate(origins)
    ]
    order = sorted(range(len(blocks)), key=lambda index: len(below[index]))
    for place, index in enumerate(order):
        if below[index] != set(order[:place]):
            other = min(below[index] ^ set(order[:place]))
            raise BlocksNotFound(
                f"Blocks {min(index, other)} and {max(index, other)} "
                f"({blocks[min(index, other)][0]}, {blocks[max(index, other)][0]}) do "
                "not run one after the other, as layers of a stack do; name others "
                "with stack=... or blocks='...'."
            )
    return tuple(tuple(blocks[index]) for index in order)
