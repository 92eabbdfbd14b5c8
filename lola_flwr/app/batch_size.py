"""The key ``batch-size``: a number of examples, or what lets rounds choose it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from lola_flwr.wire.codec import AUTO


def _known_batch(value: Any) -> Any:
    # Of a union each member would say by itself what it is not.
    try:
        is_number = value != AUTO and int(value) >= 1
    except (TypeError, ValueError):
        is_number = False
    if value == AUTO or is_number:
        return value
    raise ValueError(
        f'batch-size={value!r} must be a whole number, at least 1, or "{AUTO}"'
    )


BatchSize = Annotated[
    Annotated[int, Field(ge=1)] | Literal["auto"], BeforeValidator(_known_batch)
]
