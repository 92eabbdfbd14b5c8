"""Which arrays of a model a project exchanges with its devices, and by which names.

Most projects exchange the whole state dict, some a part of it: what they train, all but
the normalization layers, or adapters alone, whose names ``peft`` shortens. Under the
Message API the names say which arrays these are; a list of arrays has to be recognised.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lola_flwr.errors import UserError
from lola_flwr.model.adapter_blocks import is_adapted
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.model.stacks import sample_of
from lola_flwr.model.statistics import statistics_names


@dataclass(frozen=True, eq=False)
class Exchange:
    """What a project's server and devices exchange.

    Parameters
    ----------
    own
        Names under which arrays are exchanged, in the order of sending, each with the
        name that the array has in the model.
    local
        The model's names of trainable parameters and running statistics that are not
        exchanged: each device keeps its own, and trains them as the project does.
    """

    own: Mapping[str, str]
    local: tuple[str, ...]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        names: Iterable[str] | Mapping[str, npt.NDArray[Any]] | None = None,
    ) -> Exchange:
        """Return what a project exchanges that sends arrays of these names.

        Parameters
        ----------
        model
            The model.
        names
            Names of the arrays, or the arrays by name (default: the state dict).

        Raises
        ------
        UserError
            The model has no arrays of these names.
        """
        own = _own_names(model, model.state_dict() if names is None else names)
        exchanged = set(own.values())
        parameters = [n for n, p in model.named_parameters() if p.requires_grad]
        statistics = statistics_names(name for name, _ in model.named_buffers())
        local = [n for n in (*parameters, *statistics) if n not in exchanged]
        return cls(own, tuple(local))

    def wire(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return the names under which some of the model's arrays are exchanged."""
        wire = {own: name for name, own in self.own.items()}
        return tuple(wire[name] for name in names)

    def fields(self, names: Sequence[str]) -> dict[str, str]:
        """Return what an `Assignment` says of these names, where it says anything."""
        own = [self.own[name] for name in names]
        fields = {"own_names": "\n".join(own)} if own != [*names] else {}
        return fields | ({"local_names": "\n".join(self.local)} if self.local else {})


def usual_names(model: nn.Module) -> tuple[str, ...]:
    """Return what projects exchange of a model: the state dict, or the adapters."""
    return tuple(_adapter_names(model)) or tuple(model.state_dict())


def names_of_list(
    model: nn.Module, arrays: Sequence[npt.NDArray[Any]]
) -> tuple[str, ...]:
    """Recognise the arrays of a list, as ``NumPyClient`` projects exchange it.

    Parameters
    ----------
    model
        The model.
    arrays
        The list: the whole state dict, the adapters as ``get_peft_model_state_dict``
        gives them, the parameters that want gradients, all parameters, or a part of
        the state dict that is in its order, and that values or shapes tell.

    Raises
    ------
    UserError
        They are none of that, or may be several parts of the state dict.
    """
    tensors = _tensors(model)
    adapters = _adapter_names(model)
    parameters = dict(model.named_parameters())
    for own in (
        {name: name for name in model.state_dict()},
        adapters,
        {name: name for name, p in parameters.items() if p.requires_grad},
        {name: name for name in parameters},
    ):
        shapes = [_shape(tensors, name) for name in own.values()]
        if shapes == [array.shape for array in arrays]:
            return tuple(own)
    names = [name for name in model.state_dict() if name in tensors]
    shaped = [str(tuple(tensors[name].shape)) for name in names]
    # Values tell more than shapes, where the list is this very model's.
    sought = {array.shape for array in arrays}
    valued = [
        _digest_of(tensors[n]) if tuple(tensors[n].shape) in sought else ""
        for n in names
    ]
    for received, known in (
        ([_digest(array) for array in arrays], valued),
        ([str(array.shape) for array in arrays], shaped),
    ):
        places = _only_part(received, known)
        if places is not None:
            return tuple(names[place] for place in places)
    raise UserError(
        f"The list of {len(arrays)} initial arrays is not the model's state dict "
        f"({len(names)} arrays), nor a part of it that values or shapes tell: pass "
        "exchanged=[...], their names in model.state_dict(), in the list's order."
    )


def _own_names(
    model: nn.Module, exchanged: Iterable[str] | Mapping[str, Any]
) -> dict[str, str]:
    """Return the model's own name of each array that a project exchanges."""
    names, known = [*exchanged], _tensors(model)
    adapters = _adapter_names(model)
    own = {name: adapters.get(name, name) for name in names}
    unknown = [name for name in own.values() if name not in known]
    if not unknown:
        return own

    def is_inside(path: str) -> bool:
        """Tell whether a module has arrays of all these names, and of their shapes."""
        within = {name: known.get(f"{path}.{name}") for name in names}
        if not isinstance(exchanged, Mapping):
            return all(tensor is not None for tensor in within.values())
        shapes = {n: None if t is None else tuple(t.shape) for n, t in within.items()}
        return shapes == {name: tuple(a.shape) for name, a in exchanged.items()}

    inside = [path for path, _ in model.named_modules() if path and is_inside(path)]
    if len(inside) == 1:
        return {name: f"{inside[0]}.{name}" for name in names}
    raise UserError(
        f"Initial arrays: {unknown[0]} is unknown in the model "
        f"({sample_of([*known])}); pass the model whose state dict, or part of it, the "
        "project exchanges."
    )


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers, under each of their names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _adapter_names(model: nn.Module) -> dict[str, str]:
    """Return the adapters' names as peft saves them, with the model's own."""
    if not is_adapted(model):
        return {}
    from peft import get_peft_model_state_dict

    # In place of the values: their numbers.
    names = [*model.state_dict()]
    tags = {name: torch.tensor(number) for number, name in enumerate(names)}
    adapter = next(iter(model.peft_config))  # type: ignore[arg-type]
    kept = get_peft_model_state_dict(
        model, state_dict=tags, adapter_name=adapter, save_embedding_layers=False
    )
    return {name: names[int(tag)] for name, tag in kept.items()}


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(tensors[name].shape) if name in tensors else None


def _digest(array: npt.NDArray[Any]) -> str:
    values = np.ascontiguousarray(array)
    return f"{array.shape} {hashlib.sha256(values.tobytes()).hexdigest()}"


def _digest_of(tensor: Tensor) -> str:
    try:
        return _digest(tensor.numpy(force=True))
    except TypeError:
        # NumPy lacks its type: no array of a list can be equal to it.
        return ""


def _only_part(received: Sequence[str], known: Sequence[str]) -> list[int] | None:
    """Return where a sequence is inside another, in its order; None if not in one way.

    Ways are counted from the end: up to two are told apart.
    """
    ways = [[1] * (len(known) + 1)]
    for item in reversed(received):
        below, row = ways[-1], [0] * (len(known) + 1)
        for place in range(len(known) - 1, -1, -1):
            here = below[place + 1] if known[place] == item else 0
            row[place] = min(2, row[place + 1] + here)
        ways.append(row)
    if ways.pop()[0] != 1:
        return None
    places: list[int] = []
    for item in received:
        left, place = ways.pop(), places[-1] + 1 if places else 0
        while known[place] != item or not left[place + 1]:
            place += 1
        places.append(place)
    return places


def with_the_rest(
    model: nn.Module, partition: BlockPartition, exchange: Exchange
) -> BlockPartition:
    """Return the partition whose first block has what would be trained by FedAvg alone.

    Those are embeddings of transformers, mostly: back-propagation to the first block
    passes all that may depend on them. What goes by two names is left out.
    """
    exchanged = set(exchange.own.values())
    named = [*model.named_parameters(remove_duplicate=False)]
    times = Counter(id(parameter) for _, parameter in named)
    wanted = {n for n, p in named if p.requires_grad and times[id(p)] == 1}
    rest = [n for n in partition.frozen if n in wanted & exchanged]
    first, *others = partition.blocks
    return replace(
        partition,
        blocks=((*rest, *first), *others),
        frozen=tuple(n for n in partition.frozen if n not in rest),
    )
