"""Keys that are a whole number, or "auto": what lets a run choose it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from lola_flwr.wire.codec import AUTO


def _known(key: str, least: int) -> BeforeValidator:
    def known(value: Any) -> Any:
        # Of a union each member would say by itself what it is not.
        try:
            is_number = value != AUTO and int(value) == float(value) >= least
        except (TypeError, ValueError):
            is_number = False
        if value == AUTO or is_number:
            return value
        raise ValueError(
            f'{key}={value!r} must be a whole number, at least {least}, or "{AUTO}"'
        )

    return BeforeValidator(known)


BatchSize = Annotated[
    Annotated[int, Field(ge=1)] | Literal["auto"], _known("batch-size", 1)
]
OwnExamples = Annotated[
    Annotated[int, Field(ge=0)] | Literal["auto"], _known("own-examples", 0)
]
# 0: all components.
Rank = Annotated[Annotated[int, Field(ge=0)] | Literal["auto"], _known("rank", 0)]
