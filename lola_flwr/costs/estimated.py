"""What training each block costs a device: operations, memory, payload.

Estimated from parameter shapes alone, for transformers that classify sequences with
float32 weights: where a plan is made without loading torch. Where there is a model,
``lola_flwr.costs.counted`` counts. Notation: N blocks, index 0 nearest the input, depth
``d = N - index``; h hidden size, i feed-forward size, S tokens of a sequence, B
sequences of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np
import numpy.typing as npt

from lola_flwr.arrays import Float64Array
from lola_flwr.costs.layers import layer_costs, matrix_elements, recomputation_of
from lola_flwr.costs.memory import (
    Affine,
    Bytes,
    Levers,
    Recomputation,
    StepMemory,
    joined_recomputation,
)
from lola_flwr.errors import UserError
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.system.devices import DeviceProfile
from lola_flwr.wire.codec import codec_named
from lola_flwr.wire.payload import payload_bits

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True, eq=False)
class TogetherCosts:
    """What each block costs together with all behind it, trained by one device.

    Parameters
    ----------
    flops
        Operations, shape [N].
    whole_bytes, pass_bytes
        As of `StepMemory`, shape [N].
    block_bytes
        Gradients of each block alone, without the head's, shape [N].
    payload_bits
        Bits that a device with all blocks uploads.
    recomputation
        As of `StepMemory`.
    example_flops
        As of `BlockCosts`.
    """

    flops: Float64Array
    whole_bytes: Float64Array
    pass_bytes: Affine
    block_bytes: Float64Array
    payload_bits: float
    recomputation: Callable[[], Recomputation | None]
    example_flops: Float64Array | None = None


@dataclass(frozen=True, eq=False)
class BlockCosts:
    """Costs of training each block on one mini-batch.

    Parameters
    ----------
    flops
        Floating-point operations of the forward pass through the whole model and the
        backward pass from the loss to the block, shape [N].
    memory_bytes
        Weights, the gradients of block and head, the activations that back-propagation
        to the block keeps, and what the layer at work takes besides, shape [N].
    payload_bits
        Bits that the device uploads where every one sends the head's gradient beside
        its block's, shape [N].
    gradient_bytes
        Part of ``memory_bytes``: the gradients of block and head, shape [N].
    step
        Parts of the memory, by which a device that is short of it can do with less;
        None where they are not known.
    together
        Gives what blocks cost that one device trains together, when that is asked;
        None where it is not known.
    example_flops
        What each example adds to ``flops``, shape [N]; None where it is not known.
    largest
        Where these are costs of a smaller mini-batch, those that they were made of.
    """

    flops: npt.NDArray[np.float64]
    memory_bytes: npt.NDArray[np.float64]
    payload_bits: npt.NDArray[np.float64]
    gradient_bytes: npt.NDArray[np.float64]
    step: StepMemory | None = None
    together: Callable[[], TogetherCosts] | None = None
    example_flops: Float64Array | None = None
    largest: BlockCosts | None = None

    def at(self, batch_size: int) -> BlockCosts:
        """Return the costs of a mini-batch that is smaller, or as large.

        Raises
        ------
        UserError
            It is larger, or not known what a smaller one costs.
        """
        step, example_flops, together = self.step, self.example_flops, self.together
        if step is None or example_flops is None or batch_size > step.batch_size:
            raise UserError(
                f"What a batch of {batch_size} costs is not known of these costs; make "
                "them with model_costs, for the largest batch that may be asked for."
            )
        if batch_size == step.batch_size:
            return self
        fewer = step.batch_size - batch_size
        smaller = step.at(batch_size)

        def smaller_together() -> TogetherCosts:
            assert together is not None
            most = together()
            assert most.example_flops is not None
            behind = np.cumsum(most.block_bytes[::-1])[::-1] - most.block_bytes
            whole = replace(
                step,
                update_bytes=step.update_bytes + behind,
                whole_bytes=most.whole_bytes,
                pass_bytes=most.pass_bytes,
                recomputation=most.recomputation,
            ).at(batch_size)
            return replace(
                most,
                flops=most.flops - fewer * most.example_flops,
                whole_bytes=whole.whole_bytes,
                recomputation=whole.recomputation,
            )

        return replace(
            self,
            flops=self.flops - fewer * example_flops,
            memory_bytes=smaller.peak_bytes(Levers(smaller.micro_batch_size)),
            step=smaller,
            together=None if together is None else cache(smaller_together),
            largest=self.largest or self,
        )

    def joined(self, spans: Collection[Sequence[int]]) -> BlockCosts:
        """Return the costs where devices train several blocks together.

        Parameters
        ----------
        spans
            The blocks that each of these devices trains, from the input on.

        Returns
        -------
        The costs in which the first block of each span has those of the span. Memory
        is interpolated, by the size of the blocks, between that of the first block
        alone and that of it with all behind it; operations and payload are sums. Where
        layers run twice to save memory, it is that with all behind it.

        Raises
        ------
        UserError
            It is not known what several blocks cost.
        """
        spans = [span for span in spans if len(span) > 1]
        if not spans:
            return self
        if self.together is None or self.step is None:
            raise UserError(
                "What several blocks cost a device is not known of these costs; make "
                "them with model_costs, or have as many devices as blocks."
            )
        return _joined(self, self.step, self.together(), spans)

    def required_bytes(self, profiles: Sequence[DeviceProfile]) -> Float64Array:
        """Return the memory that each device takes for each block, shape [K, N].

        Of one whose steps have a size of their own, it is that of this size.
        """
        if self.step is None:
            return np.tile(self.memory_bytes, (len(profiles), 1))
        required = self.step.required_bytes(profiles)
        for rows, costs in self._of_other_sizes(profiles):
            required[rows] = costs.required_bytes([profiles[row] for row in rows])
        return required

    def required_flops(self, profiles: Sequence[DeviceProfile]) -> Float64Array:
        """Return the operations of each device for each block, shape [K, N].

        More than ``flops`` where it runs layers twice to save memory. Of one whose
        steps have a size of their own, they are those of this size.
        """
        required = np.tile(self.flops, (len(profiles), 1))
        if self.step is not None:
            required += self.step.further_flops(profiles)
        for rows, costs in self._of_other_sizes(profiles):
            required[rows] = costs.required_flops([profiles[row] for row in rows])
        return required

    def _of_other_sizes(
        self, profiles: Sequence[DeviceProfile]
    ) -> Iterator[tuple[list[int], BlockCosts]]:
        """Give rows of devices whose steps have another size, and what these cost.

        Of those that are larger than what is known, it is what the largest cost.
        """
        largest = self.largest or self
        if self.step is None or largest.step is None or largest.example_flops is None:
            return
        rows_of: dict[int, list[int]] = {}
        for row, profile in enumerate(profiles):
            if profile.batch_size is not None:
                size = int(min(profile.batch_size, largest.step.batch_size))
                rows_of.setdefault(size, []).append(row)
        for size, rows in rows_of.items():
            if size != self.step.batch_size:
                yield rows, largest.at(size)


def _joined(
    costs: BlockCosts,
    step: StepMemory,
    together: TogetherCosts,
    spans: Collection[Sequence[int]],
) -> BlockCosts:
    num_blocks = costs.flops.size
    # What a block's own gradients take besides where back-propagation passes it anyway.
    besides = -np.diff(together.flops - costs.flops, prepend=0.0)
    # What every message holds: the head's gradient, and what is around it.
    shared_bits = (costs.payload_bits.sum() - together.payload_bits) / (num_blocks - 1)
    flops, payload_bits = costs.flops.copy(), costs.payload_bits.copy()
    example_flops = None
    if costs.example_flops is not None and together.example_flops is not None:
        rises = together.example_flops - costs.example_flops
        example_besides = -np.diff(rises, prepend=0.0)
        example_flops = costs.example_flops.copy()
        for first, *further in spans:
            example_flops[first] += example_besides[further].sum()
    update_bytes, array_bytes = step.update_bytes.copy(), step.array_bytes.copy()
    part = np.zeros(num_blocks)
    for first, *further in spans:
        flops[first] += besides[further].sum()
        payload_bits[first] += (costs.payload_bits[further] - shared_bits).sum()
        update_bytes[first] += together.block_bytes[further].sum()
        array_bytes[first] = step.array_bytes[[first, *further]].max()
        if further:
            behind = together.block_bytes[first + 1 :].sum()
            part[first] = together.block_bytes[further].sum() / behind

    def between(alone: Bytes, all_behind: Bytes) -> Float64Array:
        return np.asarray(alone + part * (all_behind - alone))

    joined = replace(
        step,
        update_bytes=update_bytes,
        array_bytes=array_bytes,
        whole_bytes=between(step.whole_bytes, together.whole_bytes),
        pass_bytes=Affine(
            between(step.pass_bytes.fixed, together.pass_bytes.fixed),
            between(step.pass_bytes.per_sequence, together.pass_bytes.per_sequence),
        ),
        recomputation=cache(
            partial(
                joined_recomputation,
                step,
                together.recomputation,
                part > 0,
                update_bytes,
            )
        ),
    )
    return replace(
        costs,
        flops=flops,
        memory_bytes=joined.peak_bytes(Levers(step.micro_batch_size)),
        payload_bits=payload_bits,
        gradient_bytes=update_bytes,
        step=joined,
        example_flops=example_flops,
    )


def estimate_costs(
    shapes: Shapes,
    partition: BlockPartition,
    *,
    batch_size: int,
    sequence_length: int,
    codec: str = "fp32",
    dropout_heads: int = 0,
    merged: bool = False,
) -> BlockCosts:
    """Estimate what each block costs, from the shapes of the model's parameters.

    Parameters
    ----------
    shapes
        Shape of every parameter of the model, frozen ones too.
    partition
        The model's blocks.
    batch_size
        Sequences of a mini-batch, B.
    sequence_length
        Tokens of a sequence after padding, S.
    codec
        Name of the codec that gradients travel in.
    dropout_heads
        Attention heads, where training drops attention weights out: then each layer
        also keeps its attention maps and the masks. 0: no dropout.
    merged
        Whether one device trains the whole stack, as in ``partition.merged()``, rather
        than one block of it.

    Returns
    -------
    BlockCosts
        One entry per block; a single one if ``merged``.
    """
    tokens = batch_size * sequence_length
    layers = [
        layer_costs([shapes[name] for name in block], sequence_length, dropout_heads)
        for block in partition.blocks
    ]
    # Backward: through the layers nearer the loss, activation gradients only (as many
    # operations as their forward pass); inside the block weight gradients as well.
    forward = tokens * np.array([layer.forward_flops_per_token for layer in layers])
    passed = np.array([layer.passed_floats_per_token for layer in layers])  # [N]
    trained = np.array([layer.trained_floats_per_token for layer in layers])
    nearer_loss = np.cumsum(forward[::-1])[::-1] - forward
    flops = forward.sum() + nearer_loss + 2 * forward
    kept = np.cumsum(passed[::-1])[::-1] + trained
    behind = np.cumsum(trained[::-1])[::-1] - trained
    if merged:
        partition = partition.merged()
        flops = np.array([3 * forward.sum()])
        kept = np.array([passed.sum() + trained.sum()])
    # The head reads a part of the last layer's output, and keeps all of it; as much is
    # on its way back.
    kept = 4.0 * sequence_length * (kept + 2 * layers[-1].hidden_size)
    kept_together = kept + 4.0 * sequence_length * behind

    elements = {name: math.prod(shape) for name, shape in shapes.items()}
    updates = [
        [elements[name] for name in partition.update_names(index)]
        for index in range(partition.num_blocks)
    ]
    update_bytes = 4.0 * np.array([sum(update) for update in updates])
    head_bytes = 4.0 * sum(elements[name] for name in partition.head)
    layer_bytes = 4.0 * np.array(
        [sum(elements[name] for name in block) for block in partition.blocks]
    )
    working = max(layer.working_floats_per_token for layer in layers)
    step = StepMemory(
        batch_size=batch_size,
        micro_batch_size=batch_size,
        sequence_length=sequence_length,
        layer_bytes=layer_bytes,
        rest_bytes=4.0 * sum(elements.values()) - layer_bytes.sum() - head_bytes,
        head_bytes=head_bytes,
        update_bytes=update_bytes,
        array_bytes=4.0 * np.array([max(update) for update in updates]),
        whole_bytes=update_bytes + batch_size * kept,
        pass_bytes=Affine(np.zeros_like(kept), kept),
        working_bytes=Affine(0.0, 4.0 * sequence_length * working),
    )
    if not merged:
        twice = partial(recomputation_of, layers, batch_size, sequence_length)
        step = replace(step, recomputation=partial(twice, update_bytes))
    head = sum(matrix_elements(shapes[name]) for name in partition.head)
    # The head reads one token of each sequence.
    flops = flops + batch_size * 2 * 3 * head
    together_bytes = np.cumsum((update_bytes - head_bytes)[::-1])[::-1] + head_bytes
    one = codec_named(codec)
    together = TogetherCosts(
        flops=flops + nearer_loss,
        whole_bytes=together_bytes + batch_size * kept_together,
        pass_bytes=Affine(np.zeros_like(kept), kept_together),
        block_bytes=update_bytes - head_bytes,
        payload_bits=float(payload_bits(partition.merged(), shapes, one)[0]),
        recomputation=lambda: twice(together_bytes, together=True),
        example_flops=(flops + nearer_loss) / batch_size,
    )
    return BlockCosts(
        flops=flops,
        memory_bytes=step.peak_bytes(Levers(batch_size)),
        payload_bits=payload_bits(partition, shapes, one),
        gradient_bytes=update_bytes,
        step=step,
        together=None if merged else lambda: together,
        example_flops=flops / batch_size,
    )
