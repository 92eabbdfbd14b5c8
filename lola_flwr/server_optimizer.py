"""The server's step: an optimizer of torch.optim over the assembled gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lola_flwr.errors import UserError


class ServerOptimizer:
    """Holds the model's trainable values and steps them.

    Parameters
    ----------
    state
        Initial values by parameter name; copied.
    optimizer
        Name of a class of ``torch.optim``.
    linear_decay_steps
        Let the learning rate fall linearly, to zero after this many steps (default: it
        stays).
    **options
        The optimizer's keyword arguments: ``lr=3e-4``.

    Raises
    ------
    UserError
        No such optimizer, or options that it refuses.
    """

    def __init__(
        self,
        state: Mapping[str, npt.NDArray[np.float32]],
        *,
        optimizer: str = "AdamW",
        linear_decay_steps: int | None = None,
        **options: Any,
    ) -> None:
        factory = getattr(torch.optim, optimizer, None)
        if not (
            isinstance(factory, type) and issubclass(factory, torch.optim.Optimizer)
        ):
            raise UserError(
                f"optimizer={optimizer!r} is not an optimizer of torch.optim; try "
                "'AdamW' or 'SGD'."
            )
        self._parameters = {
            name: torch.nn.Parameter(torch.from_numpy(np.array(values, np.float32)))
            for name, values in state.items()
        }
        try:
            # Some optimizers can be made, but not stepped with a dense gradient alone.
            probe = torch.nn.Parameter(torch.zeros(1))
            probe.grad = torch.zeros(1)
            factory([probe], **options).step()
            self._optimizer = factory(self._parameters.values(), **options)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"optimizer={optimizer!r}: {error}") from None
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer,
            lambda step: (
                1.0
                if linear_decay_steps is None
                else max(0.0, 1.0 - step / linear_decay_steps)
            ),
        )

    def step(self, gradient: Mapping[str, npt.NDArray[np.float32]]) -> None:
        """Take one step; parameters without a gradient keep their values."""
        for name, parameter in self._parameters.items():
            values = gradient.get(name)
            parameter.grad = None if values is None else torch.tensor(values)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._schedule.step()

    def state(self) -> dict[str, npt.NDArray[np.float32]]:
        """Return the current values by name, as views: the next step changes them."""
        return {
            name: parameter.detach().numpy()
            for name, parameter in self._parameters.items()
        }
