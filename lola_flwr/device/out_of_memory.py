"""A device that lacks memory says so in an ordinary reply.

Killed by its system it would say nothing: Flower notices after a minute, and in a
simulation the dead worker fails every later message, too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from lola_flwr.device.contract import LocalUpdate, OutOfMemory
from lola_flwr.machine.memory import available_memory_bytes, held_memory_bytes
from lola_flwr.wire.records import Assignment


class TrainsOnDemand(Protocol):
    """A device that loads its model when there is something to train."""

    @property
    def simulated_compute_s(self) -> Callable[[Assignment], float] | None:
        """What tells how long a simulated device takes."""

    @property
    def load_model(self) -> Callable[[], Any]:
        """What gives the model and its blocks, or a model that stays on disk."""


D = TypeVar("D", bound=TrainsOnDemand)
Train = Callable[[D, Assignment, Any], LocalUpdate]


def reports_out_of_memory(train: Train[D]) -> Train[D]:
    """Let a device's train method raise OutOfMemory, and that before it is too late.

    A device that is not simulated compares the assignment's memory with what is free
    before it trains.
    """

    @wraps(train)
    def guarded(device: D, assignment: Assignment, values: Any) -> LocalUpdate:
        needed_bytes = assignment.memory_bytes
        if device.simulated_compute_s is None and needed_bytes is not None:
            loaded = device.load_model()
            model = loaded[0] if isinstance(loaded, tuple) else loaded.model
            free_bytes = usable_memory_bytes(model)
            if free_bytes < needed_bytes:
                raise OutOfMemory(
                    f"block {assignment.block_index} needs {needed_bytes:.3g} B, there "
                    f"are {free_bytes:.3g} B"
                )
        try:
            return train(device, assignment, values)
        except (MemoryError, torch.OutOfMemoryError) as error:
            reason = str(error)
        except RuntimeError as error:
            # PyTorch has no type of its own for this on CPUs.
            if "allocate memory" not in str(error):
                raise
            reason = str(error)
        # By now the tensors of the failed attempt are gone.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        raise OutOfMemory(reason)

    return guarded


def usable_memory_bytes(model: nn.Module) -> float:
    """Return what this process holds or could still get, where the model is, in bytes.

    Infinite where the system does not tell.
    """
    where = next((parameter.device for parameter in model.parameters()), None)
    if where is not None and where.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(where)
        return float(free_bytes + torch.cuda.memory_reserved(where))
    return available_memory_bytes() + held_memory_bytes()
