"""What stands on a frozen base, and how that is stored, by name; needs no PyTorch."""

from __future__ import annotations

from typing import Literal, get_args

Base = Literal["fp32", "bf16", "nf4", "int8"]
BASES: tuple[Base, ...] = get_args(Base)
QUANTISED = ("nf4", "int8")

LADDER = "ladder"
"""The tuning of a side network, and its name in a model."""
