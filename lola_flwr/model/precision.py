"""Where and in which precision a device computes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

from lola_flwr.errors import UserError

Accelerator = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["fp32", "bf16"]


def find_device(name: str = "auto") -> torch.device:
    """Return the device to compute on.

    Parameters
    ----------
    name
        "cpu", "cuda" or "mps"; "auto" takes a GPU if there is one.

    Raises
    ------
    UserError
        There is no such device here.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return torch.device(
            next(kind for kind, is_there in available.items() if is_there)
        )
    if not available.get(name, False):
        there = ", ".join(kind for kind, is_there in available.items() if is_there)
        raise UserError(
            f"accelerator={name!r} is not available here; choose from auto, {there}."
        )
    return torch.device(name)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """Return the context for the forward pass in a precision.

    In "bf16" PyTorch computes matrix products in bfloat16; weights, their gradients and
    what needs the range stay in float32. bfloat16 has the exponent of float32, so the
    loss needs no scaling.

    Raises
    ------
    UserError
        Unknown precision.
    """
    if precision == "fp32":
        return nullcontext()
    if precision != "bf16":
        raise UserError(f"precision={precision!r} is unknown; choose fp32 or bf16.")
    context: AbstractContextManager[None] = torch.autocast(device.type, torch.bfloat16)
    return context
