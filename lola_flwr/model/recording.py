"""No gradient is not a gradient of zero: tell which of the two a parameter has.

A parameter without a gradient may not be used at all (BERT's pooler, where the loss
reads another token): its gradient is zero. Or it is used where PyTorch records nothing,
as inside ``torch.no_grad``: then its gradient is not known. Re-entrant gradient
checkpointing runs layers so, and records them in a second run that never comes about
where nothing before them wants a gradient, or where only some gradients are asked for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lola_flwr.errors import UserError

if TYPE_CHECKING:
    # A worker may live in Python 3.10, whose typing lacks it.
    from typing import Self

ADVICE = (
    "pass use_reentrant=False to gradient checkpointing, and use no torch.no_grad() or "
    "detach() behind what is trained"
)


class NoGradient(UserError):
    """What was to be trained has no gradient, which is not one of zero."""


class noted_calls:
    """Note how the modules of some parameters are called, for a ``with``.

    Calls in evaluation mode that record nothing do not count.

    Parameters
    ----------
    model
        The model.
    names
        Names of the parameters.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        paths = dict.fromkeys(name.rpartition(".")[0] for name in names)
        self._modules = {path: model.get_submodule(path) for path in paths}
        self._recorded: set[str] = set()
        self._unrecorded: set[str] = set()
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        self._handles = [
            module.register_forward_pre_hook(
                partial(_note, path, self._recorded, self._unrecorded)
            )
            for path, module in self._modules.items()
        ]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def check(self, names: Iterable[str]) -> None:
        """Refuse parameters that were used, but never where PyTorch records.

        Parameters
        ----------
        names
            Names of the parameters.

        Raises
        ------
        NoGradient
            There is one.
        """
        for name in names:
            path = name.rpartition(".")[0]
            if path in self._unrecorded - self._recorded:
                raise NoGradient(
                    f"{name} has no gradient, and not one of zero: its module ran with "
                    "PyTorch's recording turned off, as re-entrant gradient "
                    f"checkpointing does; {ADVICE}."
                )


def _note(
    path: str, recorded: set[str], unrecorded: set[str], module: nn.Module, *_: object
) -> None:
    # No method: a copy of the model has a copy of this hook, and of no more.
    if torch.is_grad_enabled():
        recorded.add(path)
    elif module.training:
        unrecorded.add(path)


def require_gradients(
    what: str, names: Sequence[str], missing: Collection[str]
) -> None:
    """Refuse a part of a model of which no parameter has a gradient.

    Parameters
    ----------
    what
        What the part is: ``"block 2"``.
    names
        Names of its parameters.
    missing
        Names of the parameters that have no gradient.

    Raises
    ------
    NoGradient
        All of them are missing.
    """
    if names and set(names) <= set(missing):
        raise NoGradient(
            f"No parameter of {what} ({names[0]}, ...) has a gradient: the loss does "
            f"not depend on them, as far as PyTorch has recorded; {ADVICE}, and a "
            "layerdrop of 0 where the model leaves layers out at random."
        )


def explained(error: RuntimeError) -> RuntimeError | NoGradient:
    """Return what to raise for an error of the backward pass."""
    if "use_reentrant" in str(error):
        return NoGradient(
            "Re-entrant gradient checkpointing computes the gradients of all "
            f"parameters or none; {ADVICE}."
        )
    return error
