"""Whether training drops attention weights out, seen in a forward pass.

Dropped weights have to be kept for the way back. Where their rate and the number of
heads stand is called otherwise in every family: configurations do not tell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lola_flwr.costs.estimated import CostsNotEstimated
from lola_flwr.errors import reason_of
from lola_flwr.model.example import examples_of
from lola_flwr.model.inputs import failure_of

if TYPE_CHECKING:
    from collections.abc import Iterator


def dropped_heads(model: nn.Module) -> int:
    """Return the attention heads whose weights training drops out; 0 if it does not.

    Parameters
    ----------
    model
        The model; it stays as it is.

    Raises
    ------
    CostsNotEstimated
        The model has dropout, and runs on none of the inputs that are known here, so
        that it cannot be seen where.
    """
    if not any(map(_drops, model.modules())):
        return 0
    reason = "its kind of input is not known"
    for example in examples_of(model):
        watch = _Watch()
        with _training(model), watch:
            failure = failure_of(model, example)
        if failure is None:
            return watch.heads
        reason = reason_of(failure)
    raise CostsNotEstimated(
        f"{type(model).__name__} has dropout, and what it keeps for a step depends on "
        f"where, which could not be seen ({reason}): pass example=, the model's input "
        "for an example or more, and costs are measured."
    )


class _Watch(TorchFunctionMode):
    """Notes of how many heads weights are dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 0

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        if function is functional.scaled_dot_product_attention:
            rate = options.get("dropout_p", args[4] if len(args) > 4 else 0.0)
            if rate > 0:
                query = options["query"] if "query" in options else args[0]
                self.heads = max(self.heads, query.shape[1])
        elif function is functional.dropout:
            self._note(*args, **options)
        return function(*args, **options)

    def _note(
        self, input: Tensor, p: float = 0.5, training: bool = True, **_: bool
    ) -> None:
        hidden_states = input.dim() == 3 and len(input) == 1
        if training and p > 0 and input.dim() >= 3 and not hidden_states:
            # Queries and keys are the two largest, wherever they stand; of attention
            # within windows this gives more than there is.
            self.heads = max(self.heads, prod(sorted(input.shape)[:-2]))


def _drops(module: nn.Module) -> bool:
    """Tell whether a module drops something out, or holds the rate at which it does."""
    return any(
        "drop" in name or (name == "p" and "Dropout" in type(module).__name__)
        for name, value in vars(module).items()
        if isinstance(value, float) and 0 < value < 1
    )


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Let a model be in training, for a pass that leaves nothing behind."""
    modes = {module: module.training for module in model.modules()}
    place = next(model.parameters()).device
    for module in modes:
        # Running statistics would take the example for data.
        module.training = getattr(module, "running_mean", None) is None
    try:
        with torch.random.fork_rng([place] if place.type == "cuda" else []):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
