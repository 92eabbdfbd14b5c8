"""The last layer of a classifier, computed for the token that its head reads alone.

A head that reads the first token makes no use of what the last layer gives for others:
that token's query looks at all keys and values, and only what follows for it is
computed. In place of the others' outputs stands NaN, so that whatever reads them after
all shows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from lola_flwr.d2ft.branches import Context
from lola_flwr.d2ft.execution import replaced_layers
from lola_flwr.d2ft.find import find_subnetworks
from lola_flwr.d2ft.subnetworks import LayerNotUnderstood, LayerParts
from lola_flwr.model.blocks import BlockPartition


def last_layer_for_first_token(
    model: nn.Module, partition: BlockPartition
) -> replaced_layers:
    """Compute the last layer for the first token alone, for a ``with``.

    Parameters
    ----------
    model
        The model.
    partition
        Its blocks, each of them a layer or the adapters in one.

    Raises
    ------
    LayerNotUnderstood
        The last layer is not built as BERT's: three maps, attention of all tokens to
        all, a feed-forward network of two maps.
    """
    last = BlockPartition(partition.blocks[-1:], (), ())
    (parts,) = find_subnetworks(model, last, num_groups=1).layers
    norms = (parts.query_norm, parts.key_norm)
    if (
        len(parts.inputs) != 3
        or len(parts.ups) != 1
        or parts.sees_positions
        or parts.num_key_heads != parts.num_heads
        or not all(isinstance(norm, nn.Identity) for norm in norms)
    ):
        raise LayerNotUnderstood(
            f"{type(parts.layer).__name__} is no layer of BERT's kind."
        )

    def run(hidden: Tensor, context: Context) -> Tensor:
        first = _first(parts, hidden, context.attention_mask)
        others = hidden.new_full((), torch.nan).expand_as(hidden[:, 1:])
        return torch.cat([first, others], dim=1)

    return replaced_layers({parts: run})


def _first(parts: LayerParts, hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Return the layer's output of the first token; [B, 1, H]."""
    to_query, to_key, to_value = parts.inputs
    given = parts.norm_1(hidden) if parts.norm_first else hidden

    def heads(values: Tensor) -> Tensor:  # [B, heads, tokens, head size]
        return values.view(*values.shape[:2], -1, parts.head_size).transpose(1, 2)

    mixed = functional.scaled_dot_product_attention(
        heads(to_query(given[:, :1])),
        heads(to_key(given)),
        heads(to_value(given)),
        attn_mask=None if mask is None else mask[..., :1, :],
        dropout_p=parts.attention_dropout if parts.layer.training else 0.0,
        scale=parts.scale,
    )
    back = parts.project(mixed.transpose(1, 2).flatten(2))
    first: Tensor = hidden[:, :1] + parts.dropout_1(back)
    if not parts.norm_first:
        first = parts.norm_1(first)
    given = parts.norm_2(first) if parts.norm_first else first
    inner = parts.inner_dropout(parts.activation(parts.ups[0](given)))
    first = first + parts.dropout_2(parts.down(inner))
    if not parts.norm_first:
        first = parts.norm_2(first)
    return first
