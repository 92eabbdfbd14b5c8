"""What a round's problem follows from: what a run is told, and what is known."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from lola_flwr.allocation import (
    ENERGY_ALLOCATORS,
    IN_TURN_ALLOCATORS,
    UNIFORM_POWER_ALLOCATORS,
    Allocator,
    RoundMode,
    find_allocator,
)
from lola_flwr.arrays import BoolArray, Float64Array, IntArray
from lola_flwr.costs.estimated import BlockCosts
from lola_flwr.errors import UserError
from lola_flwr.system.channel import Channel, rates_up_bps
from lola_flwr.system.devices import DeviceProfile
from lola_flwr.system.estimation import (
    ComputeEstimate,
    DownlinkEstimate,
    RateEstimate,
)
from lola_flwr.system.own_channel import Moment
from lola_flwr.wire.payload import Payloads, UpdateSizes
from lola_flwr.zeroth_order.mixing import ZerothOrder


@dataclass(frozen=True, kw_only=True)
class AllocationOptions:
    """How blocks, bandwidth and codecs are given out.

    Parameters
    ----------
    allocator
        Name of an allocator, ``"package.module:function"``, or a function from problem
        to allocation.
    mode
        Which blocks need how many devices (default: every block one). Where there are
        too few for one block each, and no backups are asked for, each device returns
        several, see `lola_flwr.planning.windows`.
    rotation_eps
        Relative latency that may be given up for letting blocks meet other devices'
        data; 0 turns rotation off.
    sharing_eps
        Relative latency that may be given up for letting devices train a block that
        would be idle, where there are more of them than blocks need; 0: they are idle.
        A latency target is kept.
    codec_slack
        Where devices have codecs to choose from: relative latency that may be given up
        for finer ones than the coarsest; see `lola_flwr.allocation.codec_levels`.
    partial
        Whether already the first round may leave out blocks that there are no devices
        for; later ones may in any case. Blocks then take turns.
    returned_by
        How many devices are to return each block, where a round has so many: all take
        part, and each returns as many blocks as that takes. 1: what ``mode`` says.
    energy_slack
        Under an energy allocator: relative latency that may be given up for less
        energy. A latency target is kept.
    longest_round_s
        A device that would need longer for a block, had it the whole band to itself, is
        not given that block.
    batch_sizes
        Batches to choose from, whole examples: each round has the one with most
        progress a second, and then each device its own, see
        `lola_flwr.planning.batches`. With it a codec is chosen, too, for all: none
        finer than its error costs. Empty: all rounds have the run's batch.
    influence_factor
        How many times its even part of a block's latest updates a device may give that
        is asked more often than others, see `lola_flwr.planning.candidates`; infinite:
        any number. Where others do not suffice it is asked in any case.
    further_blocks
        Where batches are chosen: whether devices send blocks above their own, too,
        where that brings more than it takes, see `lola_flwr.allocation.further`.

    Raises
    ------
    UserError
        Unknown name of an allocator, negative ``codec_slack``, ``energy_slack`` or
        ``sharing_eps``, ``returned_by`` or ``influence_factor`` less than 1, or a batch
        that is no whole number of examples. An energy allocator, whose shares are no
        others, with something that would change them.
    """

    allocator: str | Allocator = "exact"
    mode: RoundMode = RoundMode()  # noqa: RUF009 (frozen)
    rotation_eps: float = 0.0
    sharing_eps: float = 0.0
    codec_slack: float = 0.1
    partial: bool = False
    returned_by: int = 1
    energy_slack: float = 0.1
    longest_round_s: float = 3600.0
    batch_sizes: tuple[int, ...] = ()
    influence_factor: float = 2.0
    further_blocks: bool = True

    def __post_init__(self) -> None:
        """Check now what would else be an error in round 1."""
        if isinstance(self.allocator, str):
            find_allocator(self.allocator)
        for name in ("codec_slack", "energy_slack", "sharing_eps"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name}={getattr(self, name)} must be at least 0.")
        sizes = tuple(self.batch_sizes)
        if not all(isinstance(size, int) and size >= 1 for size in sizes):
            raise UserError(f"batch_sizes={sizes} must be whole numbers of examples.")
        for name in ("returned_by", "influence_factor"):
            if not getattr(self, name) >= 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("batch_sizes", "rotation_eps", "sharing_eps"):
            if self.saves_energy and getattr(self, name):
                raise UserError(
                    f"{name} does not go with "
                    f"allocator={self.allocator!r}, whose shares it would change; drop "
                    "one of the two."
                )

    def check_channel(self, channel: Channel) -> None:
        """Refuse an allocator that does not know how the run's devices send.

        Raises
        ------
        UserError
            It takes them to send with uniform power per sub-carrier, or to share the
            band, and they send in turn; or something else divides the band further.
        """
        if channel.uplink == "tdma":
            self._check_in_turn(channel)
        if (
            channel.uplink == "power-limited"
            and isinstance(self.allocator, str)
            and self.allocator in UNIFORM_POWER_ALLOCATORS
        ):
            raise UserError(
                f"allocator={self.allocator!r} takes devices to send with uniform "
                f"power per sub-carrier, and under uplink={channel.uplink!r} they do "
                "not; use 'exact', or 'energy-worst'."
            )

    def _check_in_turn(self, channel: Channel) -> None:
        usual = AllocationOptions()
        name = self.allocator
        refused = {
            f"{key}={getattr(self, key)!r}"
            for key in ("rotation_eps", "sharing_eps", "batch_sizes")
            if getattr(self, key) != getattr(usual, key)
        }
        if isinstance(name, str) and ":" not in name and name not in IN_TURN_ALLOCATORS:
            refused |= {f"allocator={name!r}"}
        if channel.downlink_channel.mode == "broadcast":
            refused |= {"downlink_channel='broadcast'"}
        if refused:
            raise UserError(
                f"{', '.join(sorted(refused))}: that is for devices that share the "
                f"band, and under uplink={channel.uplink!r} they send in turn; leave "
                "it out."
            )

    @property
    def saves_energy(self) -> bool:
        """Whether the allocator is one of those that minimise energy."""
        return isinstance(self.allocator, str) and self.allocator in ENERGY_ALLOCATORS


@dataclass(frozen=True, kw_only=True, eq=False)
class RunStatement:
    """What the problems of a run's rounds have in common.

    Parameters
    ----------
    costs
        What each of the N blocks costs a device.
    sizes
        How large updates are; None: as ``costs`` says, in one codec, and with the
        head's gradient in every one.
    channel
        What the devices share.
    allocation
        How blocks and bandwidth are given out.
    zeroth_order
        How devices without the memory for back-propagation are used; None: not at all.
    reduced_schedules
        Whether devices may do less than a block takes.
    train_all
        Whether devices train all blocks, and return theirs, where their memory holds
        that.
    latency_target_s
        Time that a round may take, seconds.
    seed
        Seed of the run: the channel and random allocators follow from it.
    ranks
        How many components of its adapter a device may be told to send, lowest first,
        where rounds choose that; empty: as ``sizes`` says.
    batch_size
        Examples of a device's mini-batch, where rounds choose ranks, and not these.

    Raises
    ------
    UserError
        Devices are to have codecs of their own under an energy allocator, or the
        allocator does not know how they send.
    """

    costs: BlockCosts
    sizes: UpdateSizes | None = None
    channel: Channel = Channel()  # noqa: RUF009 (frozen)
    allocation: AllocationOptions = AllocationOptions()
    zeroth_order: ZerothOrder | None = None
    reduced_schedules: bool = False
    train_all: bool = False
    latency_target_s: float = math.inf
    seed: int = 0
    ranks: tuple[int, ...] = ()
    batch_size: int = 32

    def __post_init__(self) -> None:
        """Check what goes together."""
        self.allocation.check_channel(self.channel)
        self._check_in_turn()
        if self.ranks and self.allocation.saves_energy:
            raise UserError(
                f"rank='auto' does not go with allocator={self.allocation.allocator!r},"
                " whose shares it would change; give a number, or another allocator."
            )
        codecs = () if self.sizes is None else self.sizes.ladder
        if self.allocation.saves_energy and len(codecs) > 1:
            raise UserError(
                f"A codec out of {', '.join(codecs)} for each device does not go with "
                f"allocator={self.allocation.allocator!r}, whose shares it would "
                "change; give all one codec."
            )

    def _check_in_turn(self) -> None:
        """Refuse what chooses by shares of the band where there are none."""
        if self.channel.uplink != "tdma":
            return
        if math.isfinite(self.latency_target_s):
            what = f"latency_target_s={self.latency_target_s:g}"
        elif self.ranks:
            what = "rank='auto'"
        elif self.sizes is not None and len(self.sizes.ladder) > 1:
            what = f"A codec out of {', '.join(self.sizes.ladder)} for each device"
        else:
            return
        raise UserError(
            f"{what} is for devices that share the band, and under uplink='tdma' they "
            "send in turn; leave it out."
        )

    @property
    def num_blocks(self) -> int:
        """Number of blocks N."""
        return self.costs.flops.size

    def payloads(
        self,
        server_round: int,
        trained: BoolArray,
        spans: Collection[Sequence[int]] = (),
    ) -> Payloads:
        """Return what devices may upload in a round that trains some blocks, [N].

        Of the blocks of a span, which one device trains together, it is at the first.
        """
        if self.sizes is None:
            bits = self.costs.joined(spans).payload_bits
            return Payloads(("",), bits[None, :], trained)
        return self.sizes.payloads(server_round, trained, spans)


@dataclass(frozen=True, kw_only=True, eq=False)
class Known:
    """What is known before a round, of K devices and N blocks.

    Parameters
    ----------
    server_round
        Round, from 1.
    profiles
        What the devices say of themselves.
    estimate, rates
        Correct what they claim of their processors and links.
    downlinks
        How long they take to have their message.
    downlink_bits
        What each device is to be sent, shape [K]; None: it takes no time.
    time_s
        Wireless time of the rounds before, seconds.
    memory_limit_bytes
        Below how much memory each device's blocks had better stay, for it failed
        lately, shape [K]; infinite for devices without failures, 0 for those that rest
        altogether.
    failures
        How often each device failed, [K].
    meetings
        How often each device's update of each block was accepted, shape [K, N].
    given
        How many of each block's latest updates each device gave, shape [K, N].
    wanted
        Which blocks are to be trained, and by how many devices each.
    worth
        What each block is worth, shape [N], where only those are trained that fit the
        latency target; None: all that are wanted.
    block_updates
        Updates that each block has had, shape [N].
    partial
        Whether blocks may be left out that there is no device for.
    noise_scale
        Noise scale of each block's gradient, examples, shape [N], where batches are to
        be chosen; None: nothing is known of it.
    rounds_since
        Rounds since each block was trained, 1 for those of the last round, shape [N];
        None: it is not known.
    pace
        Progress that a second has brought so far, where batches are chosen; None: there
        were no rounds.
    usual_round_s
        Usual latency of the latest rounds, likewise.
    uplink_bps
        What the channel lets each device send over the whole band, bit/s, shape [K];
        None: it has not been drawn yet.
    component_squares
        Expected square of the gradient of each component of a block's adapter, shape
        [N, R]; None: there are none, or none is known.
    """

    server_round: int
    profiles: tuple[DeviceProfile, ...]
    estimate: ComputeEstimate = field(default_factory=ComputeEstimate)
    rates: RateEstimate = field(default_factory=RateEstimate)
    downlinks: DownlinkEstimate = field(default_factory=DownlinkEstimate)
    memory_limit_bytes: Float64Array
    failures: tuple[int, ...]
    meetings: IntArray
    given: IntArray
    wanted: RoundMode
    worth: Float64Array | None = None
    block_updates: IntArray
    partial: bool = False
    downlink_bits: Float64Array | None = None
    time_s: float = 0.0
    noise_scale: Float64Array | None = None
    rounds_since: IntArray | None = None
    pace: float | None = None
    usual_round_s: float | None = None
    uplink_bps: Float64Array | None = None
    component_squares: Float64Array | None = None

    @classmethod
    def at_first(
        cls,
        run: RunStatement,
        profiles: Sequence[DeviceProfile],
        server_round: int = 1,
        time_s: float = 0.0,
    ) -> Known:
        """Return what is known before any round: what the devices claim."""
        return cls(
            time_s=time_s,
            server_round=server_round,
            profiles=tuple(profiles),
            memory_limit_bytes=np.full(len(profiles), np.inf),
            failures=(0,) * len(profiles),
            meetings=np.zeros((len(profiles), run.num_blocks), np.int64),
            given=np.zeros((len(profiles), run.num_blocks), np.int64),
            wanted=run.allocation.mode,
            block_updates=np.zeros(run.num_blocks, np.int64),
        )

    def moment(self, run: RunStatement) -> Moment:
        """Return when the round begins."""
        return Moment(self.server_round, self.time_s, run.seed)

    def drawn(self, run: RunStatement) -> Float64Array:
        """Return what the channel lets each device send, bit/s, shape [K]."""
        if self.uplink_bps is not None:
            return self.uplink_bps
        return rates_up_bps(self.profiles, run.channel, self.moment(run))

    @property
    def one_block(self) -> BoolArray:
        """Tell which devices train one block alone, shape [K]."""
        return np.array([profile.trains_one_block for profile in self.profiles], bool)

    @property
    def names(self) -> list[str]:
        """Names of the devices."""
        return [profile.name for profile in self.profiles]
