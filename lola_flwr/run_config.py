"""An app's run configuration, checked once and completely."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from lola_flwr.errors import UserError


class RunConfig(BaseModel):
    """Base of run configurations: fields are the keys of ``[tool.flwr.app.config]``.

    A field ``batch_size`` is the key ``batch-size``; unknown keys are refused.
    """

    model_config = ConfigDict(
        alias_generator=lambda field: field.replace("_", "-"),
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
    )

    @classmethod
    def from_run_config(cls, run_config: Mapping[str, object]) -> Self:
        """Check a Flower run configuration.

        Raises
        ------
        UserError
            One line that names every key at fault, its value and the rule.
        """
        try:
            return cls.model_validate(dict(run_config))
        except ValidationError as error:
            faults = "; ".join(map(_fault_line, error.errors()))
            raise UserError(f"Run configuration: {faults}.") from None


def _fault_line(fault: ErrorDetails) -> str:
    key = ".".join(map(str, fault["loc"]))
    if not key:
        return fault["msg"]
    if fault["type"] == "missing":
        return f"{key} is missing"
    return f"{key}={fault['input']!r}: {fault['msg']}"
