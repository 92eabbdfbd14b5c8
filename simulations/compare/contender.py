"""What tells one method of local training from another: who trains what, and the mean.

In a round of such a method some devices each take several steps of their own, and
upload the values that they end with; the server puts these together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch import nn

from lola_flwr.arrays import Float32Arrays, Float64Array, IntArray
from lola_flwr.costs.estimated import BlockCosts
from lola_flwr.errors import UserError
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.system.devices import DeviceProfile
from lola_flwr.wire.codec import Codec, codec_named
from lola_flwr.wire.packing import packed_type
from lola_flwr.wire.payload import payload_bits
from simulations.compare.methods import Method


@dataclass(frozen=True)
class Part:
    """What a device trains in a round.

    Parameters
    ----------
    names
        Parameters that it trains, and uploads.
    step_flops
        Operations of one of its steps, by the cost model.
    sent_bytes
        Bytes of the values that it uploads.
    around_bytes
        Bytes of the message around them.
    pruning_rate
        Part of the rows of the layers' matrices that it does without.
    """

    names: tuple[str, ...]
    step_flops: float
    sent_bytes: int
    around_bytes: float
    pruning_rate: float = 0.0

    @property
    def payload_bits(self) -> float:
        """Bits that it uploads."""
        return 8 * (self.sent_bytes + self.around_bytes)


@dataclass(frozen=True, eq=False)
class Update:
    """What a device uploads.

    Parameters
    ----------
    values
        The values that it ends with, of the parameters of its part.
    num_examples
        Examples that it holds, by which it weighs.
    rows
        Rows that the values are of, where these are not all of a parameter.
    """

    values: Float32Arrays
    num_examples: int
    rows: Mapping[str, IntArray] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Fleet:
    """What methods decide by.

    Parameters
    ----------
    method
        Its options.
    partition
        The model's blocks, one a layer.
    costs
        What a step of each block costs.
    shapes
        Shape of each parameter that may be trained.
    profiles
        The K devices.
    num_examples
        Examples of each.
    model
        The model, with the values to start from.
    counted
        Counts again what a step of all blocks together costs, on the model as it is
        then.
    """

    method: Method
    partition: BlockPartition
    costs: BlockCosts
    shapes: Mapping[str, Sequence[int]]
    profiles: Sequence[DeviceProfile]
    num_examples: Sequence[int]
    model: nn.Module
    counted: Callable[[], BlockCosts]

    def part_from(self, first: int, end: int | None = None) -> Part:
        """Return the part of consecutive blocks: by default of all from one on."""
        span = range(first, self.partition.num_blocks if end is None else end)
        blocks, head = self.partition.blocks, self.partition.head
        names = tuple(name for block in blocks[first : span.stop] for name in block)
        whole = BlockPartition((names,), head, ())
        codec = codec_named(self.method.codec)
        bits = float(payload_bits(whole, self.shapes, codec)[0])
        sent_bytes = packed_type(
            codec, [self.shapes[n] for n in whole.trainable]
        ).nbytes
        return Part(
            names=(*names, *head),
            step_flops=float(self.costs.joined([span]).flops[first]),
            sent_bytes=sent_bytes,
            around_bytes=bits / 8 - sent_bytes,
        )


def in_fp32(method: Method) -> None:
    """Refuse a codec where bytes are counted by elements of four.

    Raises
    ------
    UserError
        The method has another codec.
    """
    if method.codec != "fp32":
        raise UserError(
            f"codec = {method.codec!r} of {method.kind}: what it sends is counted in "
            "fp32 alone; leave codec out."
        )


def as_received(update: Update, given: Float32Arrays, codec: Codec) -> Update:
    """Return what the server reads of an update whose changes travel in a codec.

    Parameters
    ----------
    update
        What a device ends with.
    given
        What it started from, of the same parameters at least.
    codec
        What values less those given travel in. What it leaves out is lost.
    """
    read = {}
    for name, value in update.values.items():
        wire = codec.encode(value - given[name])
        read[name] = given[name] + codec.decode(wire, value.shape)
    return replace(update, values=read)


def mean_of_those_that_trained(
    values: Float32Arrays, updates: Mapping[int, Update]
) -> Float32Arrays:
    """Return each parameter's mean over the devices that trained it.

    Devices weigh by their examples. A parameter that nobody trained stays.
    """
    merged = dict(values)
    for name, value in values.items():
        trained = [update for update in updates.values() if name in update.values]
        if trained:
            total = sum(update.num_examples for update in trained)
            mean = sum(
                (u.num_examples / total) * u.values[name].astype(np.float64)
                for u in trained
            )
            merged[name] = np.asarray(mean, value.dtype).reshape(value.shape)
    return merged


def as_it_is(device: int, values: Float32Arrays) -> Float32Arrays:
    """Give a device the server's values."""
    return values


@dataclass(frozen=True, kw_only=True, eq=False)
class Contender:
    """A method whose devices train by steps of their own.

    Parameters
    ----------
    parts
        Tells who trains what in a round, by its number and the devices' full-band rates
        up, bits per second, shape [K]: part by device.
    given
        Gives the values that a device starts from, of the server's.
    merged
        Puts the server's values and the devices' updates together.
    overlaps
        Whether devices upload a round's values while they compute the next: the
        server then has them a round later.
    """

    parts: Callable[[int, Float64Array], Mapping[int, Part]]
    given: Callable[[int, Float32Arrays], Float32Arrays] = as_it_is
    merged: Callable[[Float32Arrays, Mapping[int, Update]], Float32Arrays] = (
        mean_of_those_that_trained
    )
    overlaps: bool = False
