"""What the holders of sub-networks compute: their parts of a branch, either way.

On the way forward autograd records, as far as the device's memory goes. What it has not
recorded is computed anew on the way back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lola_flwr.d2ft.branches import contribute
from lola_flwr.d2ft.contexts import contexts_from_mask
from lola_flwr.d2ft.operations import Operation, from_text
from lola_flwr.d2ft.subnetworks import hidden_size
from lola_flwr.d2ft.wire import (
    HIDDEN,
    MASKS,
    MOMENTS,
    SHARED,
    SLOPES,
    array_of,
    numbers_from_text,
    sizes_from_text,
    tensors_of,
)
from lola_flwr.device.asked import Arrays, Part, PartResult, load
from lola_flwr.device.keeping import (
    INPUTS,
    Lacks,
    Recorded,
    keep_gradient,
    received,
    settled,
)
from lola_flwr.model.backprop import only_trainable
from lola_flwr.optimizer import ServerOptimizer
from lola_flwr.run.checkpoint import Snapshot
from lola_flwr.wire.packing import GRADIENTS, VALUES


def forward(part: Part) -> PartResult:
    """Compute what some groups contribute to a branch."""
    sent = {n: part.arrays[n] for n in (HIDDEN, MASKS, SHARED) if n in part.arrays}
    try:
        _load_held(part, sent)
    except Lacks as lacks:
        return part.report(lacks=str(lacks)), {}
    about = {
        "step": part.task.step,
        "numbers": part.task.numbers,
        "sizes": part.task.sizes,
    }
    part.shelf.put(INPUTS, Snapshot(sent, about))
    inputs = _Inputs.of(part, sent, about)
    outputs: dict[int, Tensor] = {}
    passes: dict[int, tuple[Tensor, Tensor]] = {}
    memory = part.keeping.memory_bytes - part.shelf.held_bytes
    memory -= sum(parameter.nbytes for parameter in part.model.parameters())
    taken = 0
    with _trained(part):
        for number, row in _rows(part).items():
            hidden = inputs.hidden[number]
            if Operation.FULL not in row or taken >= memory:
                with torch.no_grad():
                    outputs[number] = _contribution(part, number, row, inputs)
                continue
            hidden.requires_grad_()
            with torch.enable_grad(), _counted(part) as kept:
                output = _contribution(part, number, row, inputs)
            outputs[number] = output.detach()
            taken += sum(storage.nbytes() for storage in kept.values())
            if taken < memory:
                passes[number] = hidden, output
    part.shelf.record(Recorded(part.task.step, _versions(part), passes, taken))
    return part.report(), {HIDDEN: array_of([*outputs.values()])}


def backward(part: Part) -> PartResult:
    """Compute the gradients of what some groups contributed."""
    task, named, (own, shared) = part.task, part.parameters, part.slices
    recorded = part.shelf.recorded()
    passes: Mapping[int, tuple[Tensor, Tensor]] = {}
    if recorded is not None and (recorded.step, recorded.versions) == (
        task.step,
        _versions(part),
    ):
        passes = recorded.passes
    rows, inputs = _rows(part), None
    if not rows.keys() <= passes.keys():
        try:
            inputs = _kept_inputs(part)
        except Lacks as lacks:
            return part.report(lacks=str(lacks)), {}
    names = list(dict.fromkeys(piece.name for piece in (*own, *shared)))
    wanted = [named[name] for name in names]
    totals = {name: torch.zeros_like(named[name]) for name in names}
    slopes: list[Tensor] = []
    with _trained(part), torch.enable_grad():
        for (number, row), slope in zip(rows.items(), part.hidden(SLOPES), strict=True):
            if number in passes:
                hidden, output = passes[number]
            else:
                assert inputs is not None
                hidden = inputs.hidden[number].requires_grad_()
                output = _contribution(part, number, row, inputs)
            found = torch.autograd.grad(
                output,
                [*[hidden] * task.wants_inputs, *wanted],
                slope,
                allow_unused=True,
                materialize_grads=True,
            )
            slopes += found[: int(task.wants_inputs)]
            gradients = found[int(task.wants_inputs) :]
            for name, gradient in zip(names, gradients, strict=True):
                totals[name] += gradient
    arrays: dict[str, npt.NDArray[Any]] = {}
    if shared:
        arrays[GRADIENTS] = array_of([piece.of(totals[piece.name]) for piece in shared])
    if slopes:
        arrays[SLOPES] = array_of(slopes)
    if own:
        pieces = [piece.of(totals[piece.name]).numpy(force=True) for piece in own]
        keep_gradient(part.shelf, task, pieces)
    report = part.report(
        squares=_of_groups(part, totals, torch.square),
        magnitudes=_of_groups(part, named, torch.abs),
    )
    return report, arrays


def give_back(part: Part) -> PartResult:
    """Return the values that the device holds, and their moments if asked for."""
    try:
        optimizer = settled(part.shelf, part.task)
    except Lacks as lacks:
        return part.report(lacks=str(lacks)), {}
    values = optimizer.state()
    arrays = {VALUES: _array(values.values())}
    if part.task.wants_moments:
        moments = optimizer.moments(values)
        arrays[MOMENTS] = _array(m for own in moments.values() for m in own.values())
    return part.report(), arrays


@dataclass(frozen=True, eq=False)
class _Inputs:
    """What a branch is given, by the micro-batch's number."""

    hidden: dict[int, Tensor]
    masks: dict[int, Tensor]

    @classmethod
    def of(cls, part: Part, arrays: Arrays, about: Mapping[str, Any]) -> _Inputs:
        """Read it from arrays."""
        numbers, sizes = (
            numbers_from_text(about["numbers"]),
            sizes_from_text(about["sizes"]),
        )
        width = hidden_size(part.subnetworks)
        hidden = tensors_of(arrays[HIDDEN], [(*size, width) for size in sizes])
        masks = tensors_of(arrays[MASKS], sizes)
        return cls(
            {n: t.to(part.device) for n, t in zip(numbers, hidden, strict=True)},
            {n: (t != 0).to(part.device) for n, t in zip(numbers, masks, strict=True)},
        )


def _kept_inputs(part: Part) -> _Inputs:
    """Return what was sent on the way forward, with the values in place.

    Raises
    ------
    Lacks
        It is not here.
    """
    arrays, task = part.arrays, part.task
    about: Mapping[str, Any] = {"numbers": task.numbers, "sizes": task.sizes}
    if HIDDEN not in arrays:
        kept = part.shelf.get(INPUTS, lambda found: found.values["step"] == task.step)
        if kept is None:
            raise Lacks("inputs")
        arrays, about = kept.arrays, kept.values
    _load_held(part, arrays)
    return _Inputs.of(part, arrays, about)


def _load_held(part: Part, arrays: Arrays) -> None:
    """Put the values that a branch is computed with into the model.

    Raises
    ------
    Lacks
        The device does not hold them.
    """
    own, shared = part.slices
    if own:
        load(part.tensors(own), _array(_held(part).state().values()))
    if shared:
        load(part.tensors(shared), arrays[SHARED])


def _held(part: Part) -> ServerOptimizer:
    if VALUES not in part.arrays:
        return settled(part.shelf, part.task)
    shapes = [tuple(tensor.shape) for tensor in part.tensors(part.slices.own)]
    values = tensors_of(part.arrays[VALUES], shapes)
    moments: list[Tensor] = []
    if MOMENTS in part.arrays:
        sent = part.arrays[MOMENTS]
        each = sent.size // max(part.arrays[VALUES].size, 1)
        moments = tensors_of(sent, [shape for shape in shapes for _ in range(each)])
    return received(
        part.shelf, part.task, [v.numpy() for v in values], [m.numpy() for m in moments]
    )


def _contribution(
    part: Part, number: int, row: list[Operation], inputs: _Inputs
) -> Tensor:
    """Compute what the device's groups contribute in a micro-batch."""
    task, mask = part.task, inputs.masks[number]
    *_, context = contexts_from_mask(
        part.model, part.subnetworks, mask, num_layers=task.layer_index + 1
    )
    part.restart_dropout(number)
    parts = part.subnetworks.layers[task.layer_index]
    return contribute(parts, part.branch, row, inputs.hidden[number], context)


def _rows(part: Part) -> dict[int, list[Operation]]:
    """Return what all of the layer's groups do, by the micro-batch's number."""
    task = part.task
    others = part.subnetworks.num_groups - task.last_group
    return {
        number: [
            *[Operation.SKIP] * task.first_group,
            *from_text(row),
            *[Operation.SKIP] * others,
        ]
        for number, row in zip(part.numbers, task.rows.split(), strict=True)
    }


def _of_groups(
    part: Part, tensors: Mapping[str, Tensor], measure: Callable[[Tensor], Tensor]
) -> bytes:
    """Return the sum of a measure over what each group has of its own."""
    task, subnetworks = part.task, part.subnetworks
    mine = {piece.name for piece in part.slices.own}
    first = task.layer_index * subnetworks.num_groups
    sums = [
        sum(
            float(measure(piece.of(tensors[piece.name]).detach().double()).sum())
            for piece in pieces
            if piece.name in mine
        )
        for pieces in subnetworks.slices[first:][task.first_group : task.last_group]
    ]
    return np.array(sums, "<f8").tobytes()


def _trained(part: Part) -> only_trainable:
    own, shared = part.slices
    return only_trainable(part.model, {piece.name for piece in (*own, *shared)})


def _versions(part: Part) -> tuple[int, ...]:
    """Return what tells whether the trained values are as they were."""
    own, shared = part.slices
    return tuple(part.parameters[piece.name]._version for piece in (*own, *shared))


@contextmanager
def _counted(part: Part) -> Iterator[dict[int, torch.UntypedStorage]]:
    """Give the storages that autograd keeps in a ``with``, weights apart."""
    weights = {p.untyped_storage().data_ptr() for p in part.model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage
        # The tensor itself would make a cycle with its own graph, and never be freed.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield storages


def _array(arrays: Any) -> npt.NDArray[np.float32]:
    flat = [np.asarray(array, np.float32).reshape(-1) for array in arrays]
    return np.concatenate(flat) if flat else np.empty(0, np.float32)
