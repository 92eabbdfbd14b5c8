"""How the server steps, as it is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from lola_flwr.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ServerStep:
    """How the server steps, by the names of `torch.optim`.

    Parameters
    ----------
    optimizer
        Name of a class of ``torch.optim``.
    lr
        Its learning rate.
    options
        Its other keyword arguments: ``{"momentum": 0.9}``.
    linear_decay_steps, schedule, schedule_options
        As in `ServerOptimizer`.
    block_mean
        How updates are put together, as in `lola_flwr.server.model.ServedModel`.
    steady
        Whether what few devices have moved is steadied, as there. (Where a strategy is
        given a project's model and no step, it is.)
    """

    optimizer: str = "AdamW"
    lr: float = 3e-4
    options: Mapping[str, Any] = field(default_factory=dict)
    linear_decay_steps: int | None = None
    schedule: str | None = None
    schedule_options: Mapping[str, Any] = field(default_factory=dict)
    block_mean: str = "mean"
    steady: bool = False

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of a `ServerOptimizer`.

        Raises
        ------
        UserError
            An option is one that has a field of its own.
        """
        own = {f.name for f in fields(self)} & {*self.options}
        if own:
            name = min(own)
            raise UserError(
                f"options={{{name!r}: ...}}: {name} is an argument of its own; give it "
                "as that."
            )
        return {
            "optimizer": self.optimizer,
            "lr": self.lr,
            "linear_decay_steps": self.linear_decay_steps,
            "schedule": self.schedule,
            "schedule_options": self.schedule_options,
            **self.options,
        }
