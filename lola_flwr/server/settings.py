"""How a run's rounds go: what a coordinator is told, in groups of the field's terms."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from lola_flwr.errors import UserError, brief
from lola_flwr.planning import AllocationOptions
from lola_flwr.server.norm_limits import NormLimits
from lola_flwr.server.own_examples import ExampleGradients
from lola_flwr.server.selection import Selection
from lola_flwr.server.step import ServerStep
from lola_flwr.system.channel import Channel
from lola_flwr.system.devices import DeviceProfile, InvalidProfile
from lola_flwr.wire.codec import AUTO, CODECS
from lola_flwr.wire.low_rank import LowRankProjection
from lola_flwr.wire.payload import HeadPolicy
from lola_flwr.zeroth_order.mixing import ZerothOrder

Downlink = Literal["all", "changed"]
DownlinkCodec = Literal["fp32", "bf16", "int8", "int4", "int2"]


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """What travels between server and devices.

    Parameters
    ----------
    codec
        Name of the codec that gradients travel in; ``"auto"`` gives each device the
        finest that costs the round little, see `AllocationOptions`. Where devices
        return weights: what these have moved by travels in it, of ``"bf16"`` and
        ``"fp16"``; in ``"fp32"`` the weights themselves do.
    head
        Which devices send the head's gradient, which all have computed: ``"every"``
        one, that of the ``"shallowest"`` block, or ``"rotating"`` from block to block.
    low_rank
        How devices project their gradients before they send them; the optimizer is
        then one that steps in the projected space (default: they do not).
    downlink
        ``"all"``: devices are sent all arrays in every round. ``"changed"``: those that
        keep a copy are sent what has changed since.
    downlink_codec
        What a device that holds the values of the round before is sent of what has
        changed: the values (``"fp32"``), or by how much they have, in this codec. What
        that leaves out is sent with the next change; see `lola_flwr.server.reference`.
    rank
        Where blocks are LoRA adapters: how many components of its own each device sends
        the gradient of, drawn anew each round by how large they are; see
        `lola_flwr.wire.components`. ``"auto"``: as many as bring most for the round's
        time, each device its own number. None: all.

    Raises
    ------
    UserError
        ``downlink`` is neither, there is no such ``downlink_codec``, or it is for
        devices that keep copies and there are none; a rank is no whole number from 1
        on, or gradients are projected besides. (Codec, head, and whether there are as
        many components are checked with the model.)
    """

    codec: str = "fp32"
    head: HeadPolicy = "every"
    low_rank: LowRankProjection | None = None
    downlink: Downlink = "all"
    downlink_codec: DownlinkCodec = "fp32"
    rank: int | Literal["auto"] | None = None

    def __post_init__(self) -> None:
        self._check_rank()
        if self.downlink not in get_args(Downlink):
            raise UserError(f"downlink={self.downlink!r} must be 'all' or 'changed'.")
        if self.downlink_codec not in get_args(DownlinkCodec):
            raise UserError(
                f"downlink_codec={self.downlink_codec!r} must be one of "
                f"{', '.join(get_args(DownlinkCodec))}."
            )
        if self.downlink_codec != "fp32" and self.downlink != "changed":
            raise UserError(
                f"downlink_codec={self.downlink_codec!r} is for devices that keep "
                "copies; it needs downlink='changed'."
            )

    def _check_rank(self) -> None:
        rank = self.rank
        if rank is None:
            return
        if rank != AUTO and not (type(rank) is int and rank >= 1):
            raise UserError(
                f"rank={brief(rank)} must be a whole number, at least 1, or 'auto'."
            )
        if self.low_rank is not None:
            raise UserError(
                f"rank={rank!r} leaves components of adapters out, and low_rank "
                "projects them; drop one of the two."
            )


@dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """How devices are believed, and used where a block is too much for them.

    Parameters
    ----------
    assumed_profile
        Profile of devices that report none, but for its name (default: such devices
        are left out).
    correct_profiles
        Whether reported compute times correct the planned ones of later rounds, and
        measured uploads the stated rates of links.
    reputation
        Whether devices whose gradients point away from those of the others, or are
        often far too long, count less, and rest (`lola_flwr.server.reputation`). Not
        where devices return weights.
    own_examples
        Gives the gradients of some examples of the server's, with which those of
        devices are compared (`lola_flwr.server.own_examples`) (default: it has none).
    zeroth_order
        How devices without the memory for back-propagation are used (default: they are
        not).
    reduced_schedules
        Whether a device may take a block that its memory or the latency target does not
        allow, by running some layers forward only or not at all. Its gradient is then
        biased.
    train_all
        Whether devices that return weights train all that is trained where their memory
        holds it, and return their block of it. Blocks then move together, as under
        FedAvg, and whole moves are taken; the others train their block alone. (default:
        where a strategy is given a project's model they do, of a coordinator not.)
    """

    assumed_profile: DeviceProfile | None = None
    correct_profiles: bool = True
    reputation: bool = True
    own_examples: ExampleGradients | None = None
    zeroth_order: ZerothOrder | None = None
    reduced_schedules: bool = False
    train_all: bool | None = None

    def __post_init__(self) -> None:
        if self.own_examples is not None and not self.reputation:
            raise UserError(
                "own_examples are what devices are judged by, and reputation=False "
                "judges nobody; drop one of the two."
            )


@dataclass(frozen=True, kw_only=True)
class RoundSettings:
    """How a run's rounds go.

    Parameters
    ----------
    channel
        What the devices share.
    transfer
        What travels.
    allocation
        How blocks, bandwidth and codecs are given out.
    selection
        Which blocks a round trains, of those that the allocation's mode names (default:
        all of them).
    devices
        How devices are believed and used.
    limits
        How large updates may be: one device cannot throw the optimizer's moments out
        for all.
    example_weight
        What an example of a mini-batch weighs at most: its tokens where losses are
        means over tokens. A device that claims more is refused.
    seed
        Seed of the run: channel draws and random allocators follow from it.

    Raises
    ------
    UserError
        The selection does not go with the allocation's mode, its allocator not with the
        channel, the server's examples not with projected gradients, or devices without
        back-propagation not with ranks.
    """

    channel: Channel = field(default_factory=Channel)
    transfer: Transfer = field(default_factory=Transfer)
    allocation: AllocationOptions = field(default_factory=AllocationOptions)
    selection: Selection = field(default_factory=Selection)
    devices: DeviceOptions = field(default_factory=DeviceOptions)
    limits: NormLimits = field(default_factory=NormLimits)
    example_weight: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        self.selection.check(self.allocation.mode)
        self.allocation.check_channel(self.channel)
        if self.devices.own_examples is not None and self.transfer.low_rank is not None:
            raise UserError(
                "own_examples: their gradients are not compared with projected ones; "
                "drop them, or low_rank."
            )
        if self.transfer.rank is not None and self.devices.zeroth_order is not None:
            raise UserError(
                f"rank={self.transfer.rank!r}: devices without back-propagation send "
                "no components; drop rank, or zeroth_order."
            )

    def check_step(self, step: ServerStep) -> None:
        """Refuse what would not put together without bias what is drawn of gradients.

        Raises
        ------
        UserError
            Devices send some components, and their mean is not linear.
        """
        rank = self.transfer.rank
        if rank is not None and (step.block_mean != "mean" or step.steady):
            given = "steady=True" if step.steady else f"block_mean={step.block_mean!r}"
            raise UserError(
                f"rank={rank!r}: devices send components that are drawn, of which "
                f"{given} is no unbiased mean; use block_mean='mean' and steady=False."
            )

    def check_profile(self, profile: DeviceProfile) -> None:
        """Refuse a device that would not do what is planned.

        Raises
        ------
        InvalidProfile
            Its link is another, or it cannot leave components out.
        """
        self.channel.check_profile(profile)
        if self.transfer.rank is not None and profile.trains_one_block:
            raise InvalidProfile(
                f"Device {profile.name!r} trains one block, as programs do, and these "
                "send all components; leave rank out, or this device."
            )

    def check_for_weights(self) -> None:
        """Refuse what only gradients can have, where devices return weights.

        Their code knows nothing of it: what is planned would not be what they send and
        do.

        Raises
        ------
        UserError
            There is something of that.
        """
        transfer, devices = self.transfer, self.devices
        if transfer.codec not in CODECS or CODECS[transfer.codec].has_feedback:
            raise UserError(
                f"codec={brief(transfer.codec)} is for devices that send gradients, "
                "and these return weights; choose from fp32, bf16 and fp16."
            )
        for name, value, usual in (
            ("low_rank", transfer.low_rank, None),
            ("rank", transfer.rank, None),
            ("downlink_codec", transfer.downlink_codec, "fp32"),
            ("own_examples", devices.own_examples, None),
            ("zeroth_order", devices.zeroth_order, None),
            ("reduced_schedules", devices.reduced_schedules, False),
            ("batch_sizes", self.allocation.batch_sizes, ()),
        ):
            if value != usual:
                raise UserError(
                    f"{name}={brief(value)} is for devices that send gradients, and "
                    "these return weights; leave it out."
                )
