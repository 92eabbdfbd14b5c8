"""What training each block costs a device: operations, memory, payload.

Analytic, from parameter shapes alone; what adapters add is counted in
``lola_flwr.costs.adapters``. Notation: N blocks, index 0 nearest the input, depth
``d = N - index``; h hidden size, i feed-forward size, S tokens of a sequence, B
sequences of a batch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lola_flwr.costs.memory import Levers, StepMemory
from lola_flwr.errors import UserError
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.system.devices import DeviceProfile
from lola_flwr.wire.codec import codec_named
from lola_flwr.wire.payload import payload_bits, projections_bytes

Shapes = Mapping[str, Sequence[int]]


class CostsNotEstimated(UserError):
    """What a model costs does not follow from its shapes: it has to be measured."""


@dataclass(frozen=True, eq=False)
class Affine:
    """Costs that grow with the tokens of a pass: a fixed part, and one per token."""

    fixed: npt.NDArray[np.float64]
    per_token: npt.NDArray[np.float64]

    def total(self, tokens: int, passes: int = 1) -> npt.NDArray[np.float64]:
        """Return the costs of some tokens that go through in some passes."""
        return passes * self.fixed + tokens * self.per_token


@dataclass(frozen=True, eq=False)
class AdapterCosts:
    """What the adapters of each layer cost besides the layer itself, each [N].

    Parameters
    ----------
    forward_flops
        Operations of the forward pass.
    passed_flops
        Operations of the backward pass to the layer's input.
    trained_flops
        Those, and the operations for the gradient of the adapters.
    passed_bytes
        What is kept for the backward pass to the layer's input.
    trained_bytes
        What is kept besides for the gradient of the adapters.
    """

    forward_flops: Affine
    passed_flops: Affine
    trained_flops: Affine
    passed_bytes: Affine
    trained_bytes: Affine


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
        Part of ``memory_bytes``: the float32 gradients of block and head, shape [N].
    step
        Parts of the memory, by which a device that is short of it can do with less;
        None where they are not known.
    """

    flops: npt.NDArray[np.float64]
    memory_bytes: npt.NDArray[np.float64]
    payload_bits: npt.NDArray[np.float64]
    gradient_bytes: npt.NDArray[np.float64]
    step: StepMemory | None = None

    def required_bytes(
        self, profiles: Sequence[DeviceProfile]
    ) -> npt.NDArray[np.float64]:
        """Return the memory that each device takes for each block, shape [K, N]."""
        if self.step is None:
            return np.tile(self.memory_bytes, (len(profiles), 1))
        return self.step.required_bytes(profiles)


def estimate_costs(
    shapes: Shapes,
    partition: BlockPartition,
    *,
    batch_size: int,
    sequence_length: int,
    codec: str = "fp32",
    dropout_heads: int = 0,
    merged: bool = False,
    micro_batch_size: int = 0,
    adapters: AdapterCosts | None = None,
) -> BlockCosts:
    """Estimate what each block costs, from the shapes of the model's parameters.

    Parameters
    ----------
    shapes
        Shape of every parameter of the model, frozen ones too, and of the buffers that
        came with adapters.
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
    micro_batch_size
        Sequences that are computed at a time, where activations are kept for fewer
        than the whole mini-batch; 0: all of them. Operations are those of the
        mini-batch.
    adapters
        Where blocks are adapters: what these cost. Of their layers' own weights no
        gradient is computed, and nothing is kept for it.

    Returns
    -------
    BlockCosts
        One entry per block; a single one if ``merged``.
    """
    tokens = batch_size * sequence_length
    micro_batch_size = min(micro_batch_size or batch_size, batch_size)
    layers = [
        _layer_costs([shapes[name] for name in layer], sequence_length, dropout_heads)
        for layer in partition.layers or partition.blocks
    ]
    # Backward: through the layers nearer the loss, activation gradients only (as many
    # operations as their forward pass); inside the block weight gradients as well.
    forward = tokens * np.array([layer.forward_flops_per_token for layer in layers])
    backward, with_weights = forward, 2 * forward  # [N], as all below
    kept_tokens = micro_batch_size * sequence_length
    passed = np.array([layer.passed_floats_per_token for layer in layers])
    passed = 4.0 * kept_tokens * passed
    trained = np.array([layer.trained_floats_per_token for layer in layers])
    trained = 4.0 * kept_tokens * trained
    if adapters is not None:
        passes = math.ceil(batch_size / micro_batch_size)
        with_weights = backward + adapters.trained_flops.total(tokens, passes)
        backward = backward + adapters.passed_flops.total(tokens, passes)
        forward = forward + adapters.forward_flops.total(tokens, passes)
        passed = passed + adapters.passed_bytes.total(kept_tokens)
        trained = adapters.trained_bytes.total(kept_tokens)

    nearer_loss = np.cumsum(backward[::-1])[::-1] - backward
    flops = forward.sum() + nearer_loss + with_weights
    activation_bytes = np.cumsum(passed[::-1])[::-1] + trained
    if merged:
        partition = partition.merged()
        flops = np.array([forward.sum() + with_weights.sum()])
        activation_bytes = np.array([passed.sum() + trained.sum()])

    # The head reads a part of the last layer's output, and keeps all of it.
    activation_bytes = activation_bytes + 4.0 * kept_tokens * layers[-1].hidden_size

    elements = {name: math.prod(shape) for name, shape in shapes.items()}
    updates = [partition.update_names(index) for index in range(partition.num_blocks)]
    uploaded = np.array(
        [sum(elements[name] for name in update) for update in updates], np.float64
    )
    head_names = (*partition.head, *partition.frozen_head)
    head_bytes = 4.0 * sum(elements[name] for name in head_names)
    inside = [*map(set, partition.layers)] or [set()] * partition.num_blocks
    layer_bytes = 4.0 * np.array(
        [
            sum(elements[name] for name in {*block, *layer})
            for block, layer in zip(partition.blocks, inside, strict=True)
        ]
    )
    working = max(layer.working_floats_per_token for layer in layers)
    step = StepMemory(
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        sequence_length=sequence_length,
        layer_bytes=layer_bytes,
        rest_bytes=4.0 * sum(elements.values()) - layer_bytes.sum() - head_bytes,
        head_bytes=head_bytes,
        update_bytes=4.0 * uploaded,
        array_bytes=4.0
        * np.array([max(elements[name] for name in update) for update in updates]),
        kept_bytes=activation_bytes / micro_batch_size,
        passing_bytes=4.0 * sequence_length * layers[-1].hidden_size,
        working_bytes=4.0 * sequence_length * working,
    )
    head, frozen_head = (
        sum(_matrix_elements(shapes[name]) for name in names)
        for names in (partition.head, partition.frozen_head)
    )
    return BlockCosts(
        # The head reads one token of each sequence.
        flops=flops + batch_size * 2 * (3 * head + 2 * frozen_head),
        memory_bytes=step.peak_bytes(Levers(micro_batch_size)),
        payload_bits=payload_bits(partition, shapes, codec_named(codec)),
        gradient_bytes=4.0 * uploaded,
        step=step,
    )


def estimate_zeroth_order_costs(
    shapes: Shapes,
    partition: BlockPartition,
    *,
    batch_size: int,
    sequence_length: int,
    num_directions: int,
) -> BlockCosts:
    """Estimate what each block costs a device that trains by forward passes alone.

    Parameters
    ----------
    shapes, partition, batch_size, sequence_length
        As for `estimate_costs`.
    num_directions
        Directions of a mini-batch, two forward passes each.

    Returns
    -------
    Costs that hardly depend on the block: two forward passes a direction; the weights,
    a copy of block and head, and the widest layer's activations; a number a direction.
    """
    tokens = batch_size * sequence_length
    layers = [
        _layer_costs([shapes[name] for name in layer], sequence_length, 0)
        for layer in partition.layers or partition.blocks
    ]
    forward = sum(layer.forward_flops_per_token for layer in layers)
    head_forward = 2 * sum(_matrix_elements(shapes[name]) for name in partition.head)
    flops = 2 * num_directions * (tokens * forward + batch_size * head_forward)
    elements = {name: math.prod(shape) for name, shape in shapes.items()}
    moved = [
        sum(elements[name] for name in partition.update_names(index))
        for index in range(partition.num_blocks)
    ]
    # Of a forward pass, what a layer would keep for its gradient is an upper bound.
    widest = max(layer.passed_floats_per_token for layer in layers)
    weights = sum(elements.values())
    return BlockCosts(
        flops=np.full(partition.num_blocks, float(flops)),
        memory_bytes=4.0 * (weights + np.array(moved) + tokens * widest),
        payload_bits=np.full(
            partition.num_blocks, 8.0 * projections_bytes(num_directions)
        ),
        gradient_bytes=np.zeros(partition.num_blocks),
    )


@dataclass(frozen=True)
class _LayerCosts:
    forward_flops_per_token: float
    passed_floats_per_token: float
    trained_floats_per_token: float
    working_floats_per_token: float
    hidden_size: int


def _layer_costs(
    shapes: Sequence[Sequence[int]], sequence_length: int, dropout_heads: int
) -> _LayerCosts:
    """Cost one transformer layer per token.

    Saved for the gradient of a layer's input: queries, keys, values and the attention's
    output (4h), the inputs of both normalisations (2h), and the input of the
    feed-forward non-linearity (i; 3i where it is gated). Saved for the gradient of its
    weights besides: the inputs of its linear maps that are not among these, 2h + i.

    With dropout PyTorch's fused attention gives way to plain products: of each head the
    S attention weights of a token are kept before and after dropout, and what dropout
    multiplies them by; so are the factors of two more dropouts, in place of one of the
    inputs above (h in all). (Counted on CPUs; a GPU's fused kernels keep less.)

    Where nothing is saved a layer takes about i + 2h while it runs: what is inside its
    feed-forward part, and two hidden states. Where activations are saved its backward
    pass takes hardly more than they do, since it frees them on its way.
    """
    sizes = Counter(size for shape in shapes for size in shape)
    hidden = sizes.most_common(1)[0][0]
    matrices = [shape for shape in shapes if len(shape) == 2]
    feed_forward = max((max(shape) for shape in matrices), default=hidden)
    wide = sum(feed_forward in shape for shape in matrices)
    gate = 3 if wide >= 3 else 1
    elements = sum(_matrix_elements(shape) for shape in matrices)
    attention = 2 * sequence_length * hidden  # multiply-adds of QK^T and of AV
    dropped = 0.0
    if dropout_heads:
        dropped = 3.0 * dropout_heads * sequence_length + hidden
    return _LayerCosts(
        forward_flops_per_token=2.0 * (elements + attention),
        passed_floats_per_token=6.0 * hidden + gate * feed_forward + dropped,
        trained_floats_per_token=2.0 * hidden + feed_forward,
        working_floats_per_token=2.0 * hidden + feed_forward,
        hidden_size=hidden,
    )


def _matrix_elements(shape: Sequence[int]) -> int:
    return math.prod(shape) if len(shape) == 2 else 0
