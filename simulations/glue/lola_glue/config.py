"""The app's run configuration, checked once and completely."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from lola_flwr.allocation import find_allocator
from lola_flwr.errors import UserError
from lola_flwr.run.config import RunConfig
from lola_flwr.run.tracking import check_trackers
from lola_flwr.server.assembly import BLOCK_MEANS
from lola_flwr.server.selection import SELECTORS
from lola_flwr.wire.codec import codec_ladder
from lola_flwr.wire.payload import HeadPolicy
from lola_glue.tasks import find_task

if sys.version_info >= (3, 11):  # noqa: UP036
    import tomllib
else:  # the worker of a device whose system has Python 3.10
    import tomli as tomllib


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


def _checked(text: str) -> str:
    keyword_arguments(text)
    return text


def link_rates_bps(text: str) -> tuple[float, ...]:
    """Read the devices' link rates, in Mbit/s: ``"8 4 2 1"``; bit/s come back.

    Raises
    ------
    UserError
        Something else is in the text.
    """
    try:
        rates = tuple(1e6 * float(word) for word in text.replace(",", " ").split())
    except ValueError:
        rates = (0.0,)
    if not all(1e3 <= rate <= 1e12 for rate in rates):
        raise UserError(
            f"uplink-mbps={text!r}: write one rate in Mbit/s for each device, such as "
            "'8 4 2 1'."
        )
    return rates


def _checked_rates(text: str) -> str:
    link_rates_bps(text)
    return text


def _codec(name: str) -> str:
    codec_ladder(name)
    return name


# Run configurations hold scalars only, and this one is a key of caches.
Options = Annotated[str, AfterValidator(_checked)]


def _known_allocator(name: str) -> str:
    # One of the user's own is looked for where the app runs.
    if ":" not in name:
        find_allocator(name)
    return name


def _known_task(name: str) -> str:
    find_task(name)
    return name


def _known_trackers(text: str) -> str:
    check_trackers(text.split())
    return text


# Keys that say nothing under some method, and what they are by default.
_OF_BLOCKS: dict[str, object] = {
    "backups": 0,
    "devices-per-block": 1,
    "latency-target-s": 0,
    "reduced-schedules": False,
    "rotation-eps": 0,
    "selector": "all",
    "zeroth-order": "off",
}
_OF_UPDATES: dict[str, object] = {
    "allocator": "exact",
    "block-mean": "mean",
    "codec": "fp32",
    "compute-jitter": 0,
    "correct-profiles": True,
    "downlink": "all",
    "fit-memory": False,
    "head": "every",
    "longest-round-s": 3600,
    "low-rank": "",
    "micro-batch-size": 0,
    "norm-factor": 10,
    "participation": "needed",
    "profile-error": 0,
    # What it chooses depends on the weights, which change between two draws.
    "sampler": "random",
}
_OF_D2FT: dict[str, object] = {"d2ft-options": ""}
_MEANINGLESS = {
    "lola-deft": ("where every device has the model", _OF_D2FT),
    "fedavg-full": (
        "where every device trains the one block",
        {**_OF_BLOCKS, **_OF_D2FT},
    ),
    "d2ft": (
        "where no device trains a block by itself",
        {**_OF_BLOCKS, **_OF_UPDATES},
    ),
}


class GlueConfig(RunConfig):
    """Run configuration; the keys are those of ``[tool.flwr.app.config]``."""

    task: Annotated[str, AfterValidator(_known_task)]
    data_dir: str
    model: str
    num_devices: int = Field(ge=0)
    fleet: str
    interface: Literal["legacy", "message"]
    method: Literal["lola-deft", "fedavg-full", "d2ft"]
    d2ft_options: Options
    tuning: str
    tuning_options: Options
    rounds: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    sampler: Literal["random", "entropy", "coreset"]
    micro_batch_size: int = Field(ge=0)
    fit_memory: bool
    accelerator: Literal["auto", "cpu", "cuda", "mps"]
    precision: Literal["fp32", "bf16"]
    max_length: int = Field(ge=8)
    optimizer: str
    lr: float = Field(gt=0, le=100)
    optimizer_options: Options
    schedule: str
    schedule_options: Options
    max_gradient_norm: float = Field(gt=0)
    norm_factor: float = Field(ge=0)
    block_mean: Literal[BLOCK_MEANS]  # type: ignore[valid-type]
    longest_round_s: float = Field(gt=0)
    allocator: Annotated[str, AfterValidator(_known_allocator)]
    participation: Literal["needed", "all"]
    devices_per_block: int = Field(ge=1)
    backups: int = Field(ge=0)
    correct_profiles: bool
    selector: Literal[("all", *SELECTORS)]  # type: ignore[valid-type]
    selector_options: Options
    latency_target_s: float = Field(ge=0)
    block_value: Literal["staleness", "equal"]
    proxy_examples: int = Field(ge=1)
    zeroth_order: Literal["off", "fallback", "always"]
    zeroth_order_options: Options
    low_rank: Options
    reduced_schedules: bool
    rotation_eps: float = Field(ge=0, allow_inf_nan=False)
    codec: Annotated[str, AfterValidator(_codec)]
    codec_slack: float = Field(ge=0, allow_inf_nan=False)
    head: HeadPolicy
    downlink: Literal["all", "changed"]
    bandwidth_hz: float = Field(gt=0, allow_inf_nan=False)
    snr_min_db: float = Field(ge=-60, le=80)
    snr_max_db: float = Field(ge=-60, le=80)
    uplink_mbps: Annotated[str, AfterValidator(_checked_rates)]
    profile_error: float = Field(ge=0, le=3)
    compute_jitter: float = Field(ge=0, le=3)
    partitioning: Literal["iid", "dirichlet"]
    dirichlet_alpha: float = Field(gt=0)
    seed: int = Field(ge=0)
    eval_every: int = Field(ge=1)
    round_timeout_s: float = Field(gt=0)
    output_dir: str
    checkpoint_every: int = Field(ge=1)
    keep_checkpoints: int = Field(ge=1)
    save_model: bool
    save_merged: bool
    trackers: Annotated[str, AfterValidator(_known_trackers)]

    @model_validator(mode="after")
    def _keys_fit_together(self) -> GlueConfig:
        if faults := list(self._contradictions()):
            raise ValueError("; ".join(faults))
        return self

    def _contradictions(self) -> Iterator[str]:
        if self.snr_min_db > self.snr_max_db:
            yield (
                f"snr-min-db={self.snr_min_db:g} must not exceed "
                f"snr-max-db={self.snr_max_db:g}"
            )
        if self.backups and self.participation == "all":
            yield (
                f"backups={self.backups} needs spare devices, but with "
                'participation="all" there are none; drop one of the two'
            )
        reason, defaults = _MEANINGLESS[self.method]
        for key, neutral in defaults.items():
            value = getattr(self, key.replace("-", "_"))
            if value != neutral:
                yield (
                    f"{key}={json.dumps(value)} means nothing with "
                    f'method="{self.method}", {reason}; set it to '
                    f"{json.dumps(neutral)}"
                )
        if self.method == "d2ft" and self.interface != "message":
            yield 'method="d2ft" needs interface="message"'
        if self.sampler != "random":
            if find_task(self.task).is_regression:
                yield (
                    f"sampler={self.sampler!r} needs classes, but task={self.task!r} "
                    'has scores; use sampler="random"'
                )
            if self.zeroth_order != "off":
                yield (
                    f"sampler={self.sampler!r} does not go with zeroth-order="
                    f"{self.zeroth_order!r}; drop one of the two"
                )
        if self.latency_target_s and self.participation == "all":
            yield (
                f"latency-target-s={self.latency_target_s:g} leaves blocks out, and "
                'participation="all" no device; drop one of the two'
            )
        if self.latency_target_s and self.backups:
            yield (
                f"backups={self.backups} take band that latency-target-s="
                f"{self.latency_target_s:g} has no room for; drop one of the two"
            )
        if self.schedule_options and self.schedule in ("constant", "linear"):
            yield (
                f"schedule-options={self.schedule_options!r} belong to a class of "
                f"torch.optim.lr_scheduler, but schedule={self.schedule!r}"
            )
