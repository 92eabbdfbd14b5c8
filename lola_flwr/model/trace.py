"""What feeds what in a model, seen in one forward pass.

The order in which modules are registered is not the order in which they run: a
classifier may stand in front of the layers that feed it, and a norm of the embeddings
behind the layers that it feeds. PyTorch's own record of a forward pass tells: each
value knows the parameters that it was computed from. Nothing is kept for a backward
pass, so that a trace takes the memory of a forward pass on one small example.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, saved_tensors_hooks

from lola_flwr.errors import UserError, reason_of
from lola_flwr.model.backprop import only_trainable
from lola_flwr.model.stored_base import evaluation_mode

# Input of a model for some examples: its first argument, or its arguments by name. The
# first dimension of each tensor counts the examples.
Example = Tensor | Mapping[str, Tensor]

# A set of parameters: bit i stands for the i-th.
Bits = int


@dataclass(frozen=True, eq=False)
class Trace:
    """What one forward pass has shown.

    Parameters
    ----------
    bits
        The bit of each parameter.
    modules
        For each module that ran: the parameters in it, and all that its output was
        computed from.
    reached
        The parameters that the model's output was computed from.
    used
        The parameters of the modules that ran, those in modules of theirs left out.
    """

    bits: Mapping[str, Bits]
    modules: tuple[tuple[Bits, Bits], ...]
    reached: Bits
    used: Bits

    def feeding(self, names: Iterable[str]) -> set[str]:
        """Return what the modules made of these parameters were computed from."""
        return self._names(self._feeding(self._bits(names)))

    def behind(self, names: Iterable[str]) -> set[str]:
        """Return what the output needs besides these parameters, and they do not."""
        inside = self._bits(names)
        return self._names(self.reached & ~inside & ~self._feeding(inside))

    def unrecorded(self) -> set[str]:
        """Return what was used only where no gradient reaches, as in ``no_grad``."""
        recorded = _union(origin for _, origin in self.modules)
        return self._names(self.used & ~self.reached & ~recorded)

    def _feeding(self, inside: Bits) -> Bits:
        return _union(
            origin for own, origin in self.modules if own and not own & ~inside
        )

    def _bits(self, names: Iterable[str]) -> Bits:
        return _union(self.bits[name] for name in names)

    def _names(self, bits: Bits) -> set[str]:
        return {name for name, bit in self.bits.items() if bit & bits}


def traced(
    model: nn.Module,
    example: Example,
    stands_for: Callable[[str], Collection[str]] = lambda name: (name,),
) -> Trace:
    """Run a model once, in evaluation mode, and see what feeds what.

    Parameters
    ----------
    model
        The model; it stays as it is, and so do the caller's random numbers. Its
        weights may be on the meta device.
    example
        Input for an example.
    stands_for
        The names in the trace that a parameter counts for (default: its own).

    Raises
    ------
    UserError
        The model cannot be run on the example.
    """
    parameters = dict(model.named_parameters())
    targets = {name: tuple(stands_for(name)) for name in parameters}
    known = dict.fromkeys(target for each in targets.values() for target in each)
    bits = {name: 1 << index for index, name in enumerate(known)}
    bits_of = {
        id(parameter): _union(bits[target] for target in targets[name])
        for name, parameter in parameters.items()
    }
    outputs: list[tuple[Bits, list[Node]]] = []
    ran: list[Bits] = []

    def note(module: nn.Module) -> Callable[[nn.Module, Any, Any], None]:
        inside = _union(bits_of[id(values)] for values in module.parameters())
        own = _union(bits_of[id(values)] for values in module.parameters(recurse=False))

        def hook(_: nn.Module, args: Any, output: Any) -> None:
            outputs.append((inside, list(_nodes(output))))
            ran.append(own)

        return hook

    handles = [module.register_forward_hook(note(module)) for module in model.modules()]
    try:
        with _differentiable(model):
            result = _run(model, example)
    finally:
        for handle in handles:
            handle.remove()
    loss = getattr(result, "loss", None)
    ends = list(_nodes(result if loss is None else loss))
    origins = _origins([*ends, *(n for _, nodes in outputs for n in nodes)], bits_of)
    return Trace(
        bits=bits,
        modules=tuple(
            (inside, _union(origins[node] for node in nodes))
            for inside, nodes in outputs
        ),
        reached=_union(origins[node] for node in ends),
        used=_union(ran),
    )


def _run(model: nn.Module, example: Example) -> Any:
    first = next(model.parameters())

    def fit(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value  # as return_loss=True
        dtype = first.dtype if value.is_floating_point() else value.dtype
        return value.to(first.device, dtype)

    args = (fit(example),) if isinstance(example, Tensor) else ()
    named = {} if isinstance(example, Tensor) else example
    kwargs = {name: fit(value) for name, value in named.items()}
    # A model without weights has its buffers: all or nothing is computed.
    buffers = model.named_buffers() if first.is_meta else ()
    moved = {name: buffer.to("meta") for name, buffer in buffers}
    try:
        return torch.func.functional_call(model, moved, args, kwargs)
    # A model may raise anything on an input that it is not made for.
    except Exception as error:
        raise UserError(
            f"{type(model).__name__} cannot be run on an example to see what feeds "
            f"what ({reason_of(error)}); pass example=, its arguments for an example, "
            "as {'input_ids': ...}."
        ) from error


@contextmanager
def _differentiable(model: nn.Module) -> Iterator[None]:
    """Let autograd record all that depends on any weight, and keep nothing for it."""
    weights = dict(model.named_parameters())
    devices = {p.device for p in weights.values() if p.is_cuda}
    modes = evaluation_mode(model)
    try:
        with (
            only_trainable(model, (n for n, p in weights.items() if _has_gradient(p))),
            torch.random.fork_rng(devices=list(devices)),
            torch.enable_grad(),
            saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing),
        ):
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def _has_gradient(parameter: Tensor) -> bool:
    return parameter.is_floating_point() or parameter.is_complex()


def _nodes(value: Any) -> Iterator[Node]:
    """Yield where the tensors that a module returns come from."""
    if isinstance(value, Tensor):
        if value.grad_fn is not None:
            yield value.grad_fn
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _nodes(each)
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _nodes(each)


def _origins(ends: Iterable[Node], bits_of: Mapping[int, Bits]) -> dict[Node, Bits]:
    """Find what each value was computed from, first values first."""
    origins: dict[Node, Bits] = {}
    pending = list(ends)
    while pending:
        node = pending[-1]
        before = [each for each, _ in node.next_functions if each is not None]
        unknown = [each for each in before if each not in origins]
        if unknown:
            pending += unknown
            continue
        pending.pop()
        # Where a graph ends stands a parameter.
        own = bits_of.get(id(getattr(node, "variable", None)), 0)
        origins[node] = own | _union(origins[each] for each in before)
    return origins


def _union(sets: Iterable[Bits]) -> Bits:
    total = 0
    for each in sets:
        total |= each
    return total
