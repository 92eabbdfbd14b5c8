"""The run configuration of a fine-tuning app: what apps share, one model a method."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast, get_args

from pydantic import AfterValidator, Field, model_validator

from lola_flwr.allocation import (
    ALLOCATORS,
    ENERGY_ALLOCATORS,
    IN_TURN_ALLOCATORS,
    UNIFORM_POWER_ALLOCATORS,
    find_allocator,
)
from lola_flwr.app.base_keys import BaseKeys
from lola_flwr.app.batches import GIVEN_CODEC, against_choosing, batches_and_codec
from lola_flwr.app.channel_keys import ChannelKeys
from lola_flwr.app.interface import Interface, for_d2ft, interface_of
from lola_flwr.app.link_rates import LinkRates
from lola_flwr.app.number_or_auto import BatchSize, OwnExamples, Rank
from lola_flwr.planning import BATCH_SIZES
from lola_flwr.run.config import keyword_arguments
from lola_flwr.run.target import Target
from lola_flwr.run.tracking import TRACKERS, check_trackers
from lola_flwr.server.assembly import BLOCK_MEANS
from lola_flwr.server.selection import SELECTORS
from lola_flwr.server.settings import DownlinkCodec
from lola_flwr.wire.codec import AUTO, CODECS, codec_ladder
from lola_flwr.wire.payload import HeadPolicy

if TYPE_CHECKING:
    # As in `lola_flwr.run.config`.
    from typing import Self


def _checked(text: str) -> str:
    keyword_arguments(text)
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


def _known_trackers(text: str) -> str:
    check_trackers(text.split())
    return text


def _known_target(text: str) -> str:
    if text:
        Target.parse(text)
    return text


# Not all that is allowed; what is shown and completed.
Trackers = Annotated[str, AfterValidator(_known_trackers), Field(examples=[*TRACKERS])]
Allocator = Annotated[
    str,
    AfterValidator(_known_allocator),
    Field(examples=[*ALLOCATORS, *ENERGY_ALLOCATORS]),
]
CodecName = Annotated[
    str, AfterValidator(_codec), Field(examples=[*CODECS, "topk:0.01", AUTO])
]

Scalar = bool | float | int | str

# What may be changed where a stopped run goes on.
_FREE = frozenset(
    {
        "interface",
        "round_timeout_s",
        "output_dir",
        "save_model",
        "save_merged",
        "trackers",
        "eval_every",
        "target",
        "keep_checkpoints",
        "checkpoint_every",
        "other_data",
    }
)


class AppConfig(BaseKeys):
    """What every method of every app is told.

    An app's own model adds its keys, and one model a method those that not all methods
    know, with their defaults.
    """

    # Why keys of other methods mean nothing under this one.
    _because: ClassVar[str]

    model: str
    stack: str
    blocks: str
    num_devices: int = Field(ge=0)
    fleet: str
    interface: Interface
    method: str
    tuning: str
    tuning_options: Options
    rounds: int = Field(ge=1)
    batch_size: BatchSize
    accelerator: Literal["auto", "cpu", "cuda", "mps"]
    precision: Literal["fp32", "bf16"]
    max_length: int = Field(ge=8)
    optimizer: str
    lr: float = Field(gt=0, le=100)
    optimizer_options: Options
    schedule: str
    schedule_options: Options
    max_gradient_norm: float = Field(gt=0)
    norm_factor: float = Field(3.0, ge=0)
    bandwidth_hz: float = Field(gt=0, allow_inf_nan=False)
    snr_min_db: float = Field(ge=-60, le=80)
    snr_max_db: float = Field(ge=-60, le=80)
    uplink_mbps: LinkRates
    seed: int = Field(ge=0)
    eval_every: int = Field(ge=1)
    target: Annotated[str, AfterValidator(_known_target)] = ""
    round_timeout_s: float = Field(gt=0)
    output_dir: str
    checkpoint_every: int = Field(ge=1)
    keep_checkpoints: int = Field(ge=1)
    other_data: bool = False
    save_model: bool
    save_merged: bool
    trackers: Trackers

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Batches that rounds choose from; empty: they have the one that is given."""
        return BATCH_SIZES if self.batch_size == AUTO else ()

    @property
    def largest_batch(self) -> int:
        """Examples of the largest mini-batch that a device may be asked for."""
        size = self.batch_size
        return max(self.batch_sizes) if isinstance(size, str) else size

    @classmethod
    @abstractmethod
    def by_method(cls) -> tuple[type[AppConfig], ...]:
        """Return the app's models, one a method; the last has all keys there are."""

    @classmethod
    def from_run_config(cls, run_config: Mapping[str, object]) -> Self:
        """Check a Flower run configuration; return the model of its method.

        Flower passes all keys of the app: one that the method does not know has its
        default.

        Raises
        ------
        UserError
            One line that names every key at fault, its value and the rule.
        """
        *models, any_method = cls.by_method()
        if cls not in (*models, any_method):
            method = run_config.get("method")
            known = (model for model in models if model.own_method() == method)
            # Where there is no such method, other faults are said, too.
            found = next(known, any_method).from_run_config(run_config)
            return cast("Self", found)
        values = dict(run_config)
        if "interface" in values:
            values["interface"] = interface_of(values)
        values |= batches_and_codec(values)
        faults = [
            f"{key}={json.dumps(value)} means nothing with "
            f'method="{cls.own_method()}", {cls._because}; set it to {_toml(default)}'
            for key, default in cls.keys_of_others().items()
            if key in values and (value := values.pop(key)) != default
        ]
        return cls._checked(values, faults)

    @classmethod
    def rules(cls) -> dict[str, dict[str, Any]]:
        """Return what JSON Schema says of each key, of all methods' for all methods."""
        *models, any_method = cls.by_method()
        if cls in (*models, any_method):
            return super().rules()
        return any_method.rules()

    @classmethod
    def own_method(cls) -> str:
        """Return the name of the method whose model this is."""
        return str(get_args(cls.model_fields["method"].annotation)[0])

    @classmethod
    def keys_of_others(cls) -> dict[str, Scalar]:
        """Return the keys that this method does not know, with their defaults."""
        return {
            str(field.alias): field.default
            for name, field in cls.by_method()[-1].model_fields.items()
            if name not in cls.model_fields
        }

    def results_depend_on(self) -> dict[str, Scalar]:
        """Return the part of the run configuration that a run is only resumed with.

        It has all methods' keys, and `rounds` where the rate depends on it.
        """
        free = _FREE if self.schedule == "linear" else {*_FREE, "rounds"}
        return {
            **self.keys_of_others(),
            **self.model_dump(by_alias=True, exclude=set(free)),
        }

    @model_validator(mode="after")
    def _keys_fit_together(self) -> AppConfig:
        if faults := list(self._contradictions()):
            raise ValueError("; ".join(faults))
        return self

    def _contradictions(self) -> Iterator[str]:
        yield from self._base_faults(self.tuning)
        if self.batch_size == AUTO:
            for against in against_choosing(self.to_run_config()):
                yield f'batch-size="auto" does not go with {against}; give a batch-size'
        if self.stack and self.blocks:
            yield (
                f"stack={self.stack!r} and blocks={self.blocks!r} both say what the "
                "blocks are; drop one of the two"
            )
        if self.snr_min_db > self.snr_max_db:
            yield (
                f"snr-min-db={self.snr_min_db:g} must not exceed "
                f"snr-max-db={self.snr_max_db:g}"
            )
        if self.schedule_options and self.schedule in ("constant", "linear"):
            yield (
                f"schedule-options={self.schedule_options!r} belong to a class of "
                f"torch.optim.lr_scheduler, but schedule={self.schedule!r}"
            )


class UpdatesConfig(ChannelKeys, AppConfig):
    """What is told where devices send updates of what they trained by themselves."""

    micro_batch_size: int = Field(0, ge=0)
    fit_memory: bool = False
    activations: Literal["exact", "int8"] = "exact"
    influence_factor: float = Field(2.0, ge=0, allow_inf_nan=False)
    own_examples: OwnExamples = "auto"
    reputation: bool = True
    block_mean: Literal[BLOCK_MEANS] = "mean"  # type: ignore[valid-type]
    longest_round_s: float = Field(3600.0, gt=0)
    allocator: Allocator = "exact"
    energy_slack: float = Field(0.1, ge=0, allow_inf_nan=False)
    correct_profiles: bool = True
    low_rank: Options = ""
    codec: CodecName = GIVEN_CODEC
    codec_slack: float = Field(0.1, ge=0, allow_inf_nan=False)
    head: HeadPolicy = "every"
    downlink: Literal["all", "changed"] = "all"
    downlink_codec: DownlinkCodec = "fp32"
    profile_error: float = Field(0.0, ge=0, le=3)
    compute_jitter: float = Field(0.0, ge=0, le=3)

    def _contradictions(self) -> Iterator[str]:
        if self.downlink_codec != "fp32" and self.downlink != "changed":
            yield (
                f"downlink-codec={self.downlink_codec!r} is for devices that keep "
                'copies; use downlink="changed" with it'
            )
        yield from self._rates_twice({"uplink-mbps": self.uplink_mbps})
        limited = self.uplink == "power-limited"
        if limited and self.allocator in UNIFORM_POWER_ALLOCATORS:
            yield (
                f"allocator={self.allocator!r} takes devices to send with uniform "
                f"power per sub-carrier, and under uplink={self.uplink!r} they do not; "
                "use 'exact', or 'energy-worst'"
            )
        if self.uplink == "tdma":
            yield from self._not_in_turn()
        if self.allocator in ENERGY_ALLOCATORS and self.codec == AUTO:
            yield (
                f'codec="auto" chooses for time, and allocator={self.allocator!r} for '
                "energy; give a codec"
            )
        yield from super()._contradictions()

    def _not_in_turn(self) -> Iterator[str]:
        own = ":" in self.allocator
        for key, divides in {
            "allocator": not own and self.allocator not in IN_TURN_ALLOCATORS,
            "codec": self.codec == AUTO,
            "downlink_channel": self.downlink_channel == "broadcast",
            **{
                key: getattr(self, key, 0) > 0
                for key in ("latency_target_s", "rotation_eps", "sharing_eps")
            },
        }.items():
            if divides:
                yield (
                    f"{key.replace('_', '-')}={getattr(self, key)!r} is for devices "
                    "that share the band, and under uplink='tdma' they send in turn; "
                    "drop one of the two"
                )


class LolaDeftConfig(UpdatesConfig):
    """LoLa-DEFT: each device trains one block, and more of them where that pays."""

    _because = "where every device has the model"

    participation: Literal["needed", "all"] = "needed"
    devices_per_block: int = Field(1, ge=1)
    further_blocks: bool = True
    backups: int = Field(0, ge=0)
    selector: Literal[("all", *SELECTORS)] = "all"  # type: ignore[valid-type]
    selector_options: Options = ""
    latency_target_s: float = Field(0.0, ge=0)
    block_value: Literal["staleness", "equal"] = "staleness"
    proxy_examples: int = Field(64, ge=1)
    zeroth_order: Literal["off", "fallback", "always"] = "off"
    zeroth_order_options: Options = ""
    reduced_schedules: bool = False
    rotation_eps: float = Field(0.0, ge=0, allow_inf_nan=False)
    sharing_eps: float = Field(0.0, ge=0, allow_inf_nan=False)
    rank: Rank = 0

    def _contradictions(self) -> Iterator[str]:
        if self.backups and self.participation == "all":
            yield (
                f"backups={self.backups} needs spare devices, but with "
                'participation="all" there are none; drop one of the two'
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
        yield from super()._contradictions()


class FedAvgFullConfig(UpdatesConfig):
    """The baseline: every device trains the whole stack, which is the one block."""

    _because = "where every device trains the one block"


class D2ftConfig(AppConfig):
    """D2FT: the model is spread over the devices."""

    _because = "where no device trains a block by itself"
    interface: Annotated[Interface, AfterValidator(for_d2ft)]
    batch_size: int = Field(ge=1)
    d2ft_options: Options = ""

    def _contradictions(self) -> Iterator[str]:
        if self.base != "fp32":
            yield (
                f'base={self.base!r} does not go with method="d2ft", which cuts the '
                'weights of layers; use base="fp32"'
            )
        if self.pruning:
            yield (
                f'pruning={self.pruning!r} does not go with method="d2ft", of which '
                'no device holds a whole model; use pruning=""'
            )
        yield from super()._contradictions()


def _toml(value: Scalar) -> str:
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)
