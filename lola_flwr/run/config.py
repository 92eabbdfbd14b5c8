"""An app's run configuration, checked once and completely."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from lola_flwr.errors import UserError, nearest

if TYPE_CHECKING:
    # A worker may live in Python 3.10, whose typing lacks it.
    from typing import Self

if sys.version_info >= (3, 11):  # noqa: UP036
    import tomllib
else:  # the worker of a device whose system has Python 3.10
    import tomli as tomllib


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
        return cls._checked(run_config)

    @classmethod
    def rules(cls) -> dict[str, dict[str, Any]]:
        """Return what JSON Schema says of each key: bounds, values, examples."""
        properties: dict[str, dict[str, Any]] = cls.model_json_schema()["properties"]
        return properties

    @classmethod
    def _checked(
        cls, run_config: Mapping[str, object], faults: Sequence[str] = ()
    ) -> Self:
        """Check as `from_run_config`; faults that are known already are said, too."""
        said = list(faults)
        try:
            config = cls.model_validate(dict(run_config))
        except ValidationError as error:
            known = [field.alias or name for name, field in cls.model_fields.items()]
            said = [*(_fault_line(fault, known) for fault in error.errors()), *said]
        if said:
            end = "" if said[-1].endswith("?") else "."
            raise UserError(f"Run configuration: {'; '.join(said)}{end}")
        return config

    def to_run_config(self) -> dict[str, Any]:
        """Return the configuration under its run-config keys."""
        return self.model_dump(by_alias=True)


def _fault_line(fault: Mapping[str, Any], known: Collection[str]) -> str:
    key = ".".join(map(str, fault["loc"]))
    says = str(fault["msg"]).removeprefix("Value error, ").removesuffix(".")
    if fault["type"] == "missing":
        return f"{key} is missing"
    if fault["type"] == "extra_forbidden":
        return f"there is no key {key!r}.{nearest(key, known)}".removesuffix(".")
    # A validator of the package's own, or of the whole configuration, says it all.
    own = fault["type"] == "value_error"
    if not key or (own and repr(fault["input"]) in says):
        return says
    return f"{key}={fault['input']!r}: {says}"


def keyword_arguments(text: str) -> dict[str, Any]:
    """Read keyword arguments in TOML's notation: ``"betas=[0.9, 0.99], eps=1e-3"``.

    Raises
    ------
    UserError
        The text is none.
    """
    try:
        options: dict[str, Any] = tomllib.loads(f"_ = {{{text}}}")["_"]
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"Write options as 'a=1, b=[2, 3]' ({error}).") from None
    return options
