"""Make a model smaller by what is cut off its layers, and see that it still computes.

A layer of attention and a feed-forward network is its input plus the sum of what heads
and neurons contribute: the one that is left is the one in which those that went
contribute nothing. How code knows the number of its heads differs; so what has become
of each layer is seen anew, at random values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lola_flwr.d2ft.cuts import Cut
from lola_flwr.d2ft.find import find_subnetworks, forget
from lola_flwr.d2ft.maps import in_features, outputs_dim
from lola_flwr.d2ft.subnetworks import LayerNotUnderstood, LayerParts
from lola_flwr.errors import UserError
from lola_flwr.model.blocks import BlockPartition

# What modules call the number of their heads, and the width of all of them together.
_NUM_HEADS = ("num_heads", "num_attention_heads", "n_heads")
_NUM_KEY_HEADS = ("num_key_value_heads", "num_kv_heads")
_WIDTH = ("all_head_size", "split_size")
# What linear maps call the numbers of their features; GPT-2's have the second pair.
_OUTPUTS, _INPUTS = ("out_features", "nf"), ("in_features", "nx")


def prune(model: nn.Module, partition: BlockPartition, cuts: Mapping[str, Cut]) -> None:
    """Leave out of a model's linear maps what is cut off, in place.

    The weights that went are freed with the model's last copy of them. ``model.config``
    still has the sizes that were.

    Parameters
    ----------
    model
        The model, without adapters.
    partition
        Its blocks.
    cuts
        What is left, as `cuts_of` has chosen.

    Raises
    ------
    UserError
        A layer computes something else now than the rest of its heads and neurons: the
        model's code takes their number from elsewhere.
    """
    if not cuts:
        return
    before = find_subnetworks(model, partition).layers
    sizes = [_head_sizes(parts) for parts in before]
    for path, cut in cuts.items():
        _shrink(model.get_submodule(path), cut)
    for parts, was in zip(before, sizes, strict=True):
        _tell(parts, was)
    forget(model)
    try:
        after = find_subnetworks(model, partition).layers
    except LayerNotUnderstood as error:
        raise _not_prunable(model, str(error).removesuffix(".")) from error
    for parts, was in zip(after, sizes, strict=True):
        if parts.head_size != was[2] or parts.num_heads * was[1] != (
            parts.num_key_heads * was[0]
        ):
            raise _not_prunable(model, "its heads have another width without others")


def _head_sizes(parts: LayerParts) -> tuple[int, int, int]:
    """Return the heads of queries, those of keys, and the width of one."""
    return parts.num_heads, parts.num_key_heads, parts.head_size


def _not_prunable(model: nn.Module, why: str) -> UserError:
    return UserError(
        f"pruning: {type(model).__name__} does not run with fewer heads or neurons "
        f"({why}); leave heads at 0, or pruning at ''."
    )


@torch.no_grad()
def _shrink(linear: Any, cut: Cut) -> None:
    """Leave of a linear map the features that are kept."""
    of_outputs = cut.side == "outputs"
    dim = outputs_dim(linear) if of_outputs else 1 - outputs_dim(linear)
    kept = torch.from_numpy(cut.kept).to(linear.weight.device)
    for name, parameter in [*linear.named_parameters(recurse=False)]:
        if name == "weight" or of_outputs:  # a bias is of the outputs
            along = dim if name == "weight" else 0
            part = parameter.detach().index_select(along, kept).contiguous()
            setattr(linear, name, nn.Parameter(part, parameter.requires_grad))
    for name in _OUTPUTS if of_outputs else _INPUTS:
        if hasattr(linear, name):
            setattr(linear, name, len(cut.kept))


def _tell(parts: LayerParts, was: tuple[int, int, int]) -> None:
    """Tell the modules of attention how many heads they have now."""
    num_heads, num_key_heads, size = was
    width = in_features(parts.project)
    # All heads of keys have as many heads of queries.
    left = width // size
    for names, old, new in (
        (_NUM_HEADS, num_heads, left),
        (_NUM_KEY_HEADS, num_key_heads, left * num_key_heads // num_heads),
        (_WIDTH, num_heads * size, width),
    ):
        for module in parts.layer.modules():
            for name in names:
                if vars(module).get(name) == old:
                    setattr(module, name, new)
