"""Find the sub-networks of a model, in layers of the families that are understood."""

from __future__ import annotations

from typing import Any

from torch import nn

from lola_flwr.d2ft.subnetworks import (
    Branch,
    LayerNotUnderstood,
    LayerParts,
    Subnetworks,
    branch_slices,
    layer_names,
)
from lola_flwr.errors import UserError
from lola_flwr.model.blocks import BlockPartition

# Where the parts of a layer are found: BERT and RoBERTa; ViT as of transformers 5; ViT
# before; DistilBERT. The first name of each is that of the parameters' owner.
_PLACES: dict[str, tuple[str, ...]] = {
    "query": (
        "attention.self.query",
        "attention.q_proj",
        "attention.attention.query",
        "attention.q_lin",
    ),
    "key": (
        "attention.self.key",
        "attention.k_proj",
        "attention.attention.key",
        "attention.k_lin",
    ),
    "value": (
        "attention.self.value",
        "attention.v_proj",
        "attention.attention.value",
        "attention.v_lin",
    ),
    "project": ("attention.output.dense", "attention.o_proj", "attention.out_lin"),
    "up": ("intermediate.dense", "mlp.fc1", "ffn.lin1"),
    "activation": (
        "intermediate.intermediate_act_fn",
        "mlp.activation_fn",
        "ffn.activation",
    ),
    "down": ("output.dense", "mlp.fc2", "ffn.lin2"),
    "norm_1": ("attention.output.LayerNorm", "layernorm_before", "sa_layer_norm"),
    "norm_2": ("output.LayerNorm", "layernorm_after", "output_layer_norm"),
    "num_heads": (
        "attention.self.num_attention_heads",
        "attention.num_attention_heads",
        "attention.attention.num_attention_heads",
        "attention.n_heads",
    ),
}
_OPTIONAL: dict[str, tuple[str, ...]] = {
    "attention_dropout": (
        "attention.self.dropout",
        "attention.attention_dropout",
        "attention.attention.dropout_prob",
        "attention.dropout",
    ),
    "dropout_1": ("attention.output.dropout", "dropout"),
    "dropout_2": ("output.dropout", "dropout", "ffn.dropout"),
}


def find_subnetworks(
    model: nn.Module, partition: BlockPartition, *, num_groups: int | None = None
) -> Subnetworks:
    """Cut a model's layers into sub-networks.

    Parameters
    ----------
    model
        A model of the families BERT, RoBERTa, DistilBERT or ViT, perhaps with low-rank
        adapters.
    partition
        Its blocks, each of them a layer or the adapters in one.
    num_groups
        Groups to divide each layer's heads into (default: one for each head).

    Raises
    ------
    LayerNotUnderstood
        A layer is of none of these families.
    UserError
        There are not so many heads.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    layers = tuple(
        _parts(model.get_submodule(name), name, num_groups)
        for name in layer_names(partition)
    )
    slices = tuple(
        tuple(
            part
            for branch in Branch
            for part in branch_slices(parts, branch, group, group + 1, names)
        )
        for parts in layers
        for group in range(parts.num_groups)
    )
    return Subnetworks(layers, slices)


def _parts(layer: nn.Module, name: str, num_groups: int | None) -> LayerParts:
    found: dict[str, Any] = {}
    for part, places in _PLACES.items():
        values = [value for p in places if (value := _at(layer, p)) is not None]
        if not values:
            raise LayerNotUnderstood(
                f"{name} ({type(layer).__name__}) has no {part} at any of "
                f"{', '.join(places)}; sub-networks are known of BERT, RoBERTa, "
                "DistilBERT and ViT layers."
            )
        found[part] = values[0]
    for part, places in _OPTIONAL.items():
        found[part] = next((v for p in places if (v := _at(layer, p)) is not None), 0.0)
    rate = found.pop("attention_dropout")
    num_heads = found.pop("num_heads")
    num_groups = num_heads if num_groups is None else num_groups
    if type(num_groups) is not int or not 1 <= num_groups <= num_heads:
        raise UserError(
            f"num_groups={num_groups!r} must be a whole number from 1 to {num_heads}, "
            f"the heads of {name}."
        )
    for dropout in ("dropout_1", "dropout_2"):
        if not isinstance(found[dropout], nn.Module):
            found[dropout] = nn.Identity()
    return LayerParts(
        layer=layer,
        norm_first=hasattr(layer, "layernorm_before"),
        attention_dropout=float(getattr(rate, "p", rate)),
        num_heads=num_heads,
        num_groups=num_groups,
        **found,
    )


def _at(layer: Any, place: str) -> Any:
    for name in place.split("."):
        layer = getattr(layer, name, None)
    return layer
