"""What a transformer layer costs a token, from the shapes of its parameters."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lola_flwr.arrays import Float64Array
from lola_flwr.costs.memory import Affine, Recomputation


def recomputation_of(
    layers: Sequence[LayerCosts],
    batch_size: int,
    sequence_length: int,
    update_bytes: Float64Array,
    *,
    together: bool = False,
) -> Recomputation:
    """Cost steps that keep what goes into each layer, and more of one at a time."""
    forward = np.array([layer.forward_flops_per_token for layer in layers])
    passed = np.array([layer.passed_floats_per_token for layer in layers])
    trained = passed + [layer.trained_floats_per_token for layer in layers]
    hidden = layers[-1].hidden_size
    inputs = hidden * np.arange(len(layers), 0.0, -1)
    most = inputs + (trained if together else passed).max()
    # Of the last layer's output all is kept, and as much is on its way back.
    floats = 2 * hidden + np.maximum(most, hidden + trained)
    kept = 4.0 * sequence_length * floats
    suffix = np.cumsum(forward[::-1])[::-1]
    return Recomputation(
        further_flops=batch_size * sequence_length * suffix,
        whole_bytes=update_bytes + batch_size * kept,
        pass_bytes=Affine(np.zeros_like(kept), kept),
    )


@dataclass(frozen=True)
class LayerCosts:
    """What a layer costs a token: operations forward, floats kept, and its width."""

    forward_flops_per_token: float
    passed_floats_per_token: float
    trained_floats_per_token: float
    working_floats_per_token: float
    hidden_size: int


def layer_costs(
    shapes: Sequence[Sequence[int]], sequence_length: int, dropout_heads: int
) -> LayerCosts:
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
    elements = sum(matrix_elements(shape) for shape in matrices)
    attention = 2 * sequence_length * hidden  # multiply-adds of QK^T and of AV
    dropped = 0.0
    if dropout_heads:
        dropped = 3.0 * dropout_heads * sequence_length + hidden
    return LayerCosts(
        forward_flops_per_token=2.0 * (elements + attention),
        passed_floats_per_token=6.0 * hidden + gate * feed_forward + dropped,
        trained_floats_per_token=2.0 * hidden + feed_forward,
        working_floats_per_token=2.0 * hidden + feed_forward,
        hidden_size=hidden,
    )


def matrix_elements(shape: Sequence[int]) -> int:
    """Return the elements of a matrix; what is none has none."""
    return math.prod(shape) if len(shape) == 2 else 0
