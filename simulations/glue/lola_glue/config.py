"""The app's run configuration, checked once and completely."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lola_flwr.codec import CODECS
from lola_flwr.errors import UserError


class GlueConfig(BaseModel):
    """Run configuration; the keys are those of ``[tool.flwr.app.config]``."""

    model_config = ConfigDict(
        alias_generator=lambda field: field.replace("_", "-"),
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
    )

    task: str
    data_dir: str
    model: str
    num_devices: int = Field(ge=0)
    method: Literal["lola-deft", "fedavg-full"]
    rounds: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    max_length: int = Field(ge=8)
    optimizer: str
    lr: float = Field(gt=0, le=100)
    schedule: Literal["constant", "linear"]
    max_gradient_norm: float = Field(gt=0)
    allocator: str
    participation: Literal["needed", "all"]
    devices_per_block: int = Field(ge=1)
    backups: int = Field(ge=0)
    correct_profiles: bool
    rotation_eps: float = Field(ge=0, allow_inf_nan=False)
    codec: Literal[tuple(CODECS)]  # type: ignore[valid-type]
    bandwidth_hz: float = Field(gt=0, allow_inf_nan=False)
    snr_min_db: float = Field(ge=-60, le=80)
    snr_max_db: float = Field(ge=-60, le=80)
    profile_error: float = Field(ge=0, le=3)
    compute_jitter: float = Field(ge=0, le=3)
    partitioning: Literal["iid", "dirichlet"]
    dirichlet_alpha: float = Field(gt=0)
    seed: int = Field(ge=0)
    eval_every: int = Field(ge=1)
    round_timeout_s: float = Field(gt=0)
    output_dir: str

    @model_validator(mode="after")
    def _snr_range_is_ordered(self) -> GlueConfig:
        if self.snr_min_db > self.snr_max_db:
            raise ValueError(
                f"snr-min-db={self.snr_min_db:g} must not exceed "
                f"snr-max-db={self.snr_max_db:g}"
            )
        return self

    @classmethod
    def from_run_config(cls, run_config: Mapping[str, object]) -> GlueConfig:
        """Check a Flower run configuration.

        Raises
        ------
        UserError
            One line that names every key at fault, its value and the rule.
        """
        try:
            return cls.model_validate(dict(run_config))
        except ValidationError as error:
            faults = [
                f"{'.'.join(map(str, fault['loc']))}={fault['input']!r}: {fault['msg']}"
                if fault["loc"]
                else fault["msg"]
                for fault in error.errors()
            ]
            raise UserError(f"Run configuration: {'; '.join(faults)}.") from None
