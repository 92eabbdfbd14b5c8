"""Payload codecs: how a gradient travels, and how received bytes are read safely.

A codec turns a float32 array into one array of a wire type and back. What travels for
an array of a given shape has a shape, a type and so a size of its own that are known
beforehand: the allocation counts them, and the reader refuses whatever differs before
it takes any memory. NumPy has no bfloat16, so "bf16" travels as uint16. Every array
crosses the network in NumPy's .npy format, as Flower serialises it; nothing is ever
unpickled.

"int8", "int4", "int2" and "topk" lose so much that what they leave out must not be
lost: the device adds it to its next gradient of the same block (*error feedback*; Seide
et al., Interspeech 2014; Stich, Cordonnier, Jaggi, NeurIPS 2018). See
`lola_flwr.device.store.Residuals` for how long it is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Protocol

import numpy as np

from lola_flwr.arrays import Float32Array
from lola_flwr.errors import UserError
from lola_flwr.wire.integers import Int2, Int4, Int8
from lola_flwr.wire.npy import MalformedArray, WireArray, WireType
from lola_flwr.wire.passes import from_bf16, to_bf16, where_largest


class Codec(Protocol):
    """A representation of float32 arrays for the wire."""

    @property
    def has_feedback(self) -> bool:
        """Whether what it leaves out goes into the device's next gradient."""

    def wire_type(self, shape: Sequence[int]) -> WireType:
        """Tell what travels for an array of a shape; of one dtype for all shapes."""

    def encode(self, values: Float32Array) -> WireArray:
        """Return what travels: an array of ``wire_type(values.shape)``."""

    def decode(self, wire: WireArray, shape: Sequence[int]) -> Float32Array:
        """Return the values of an array of that ``wire_type``, in their shape.

        Raises
        ------
        MalformedArray
            No encoder gives such an array.
        """


@dataclass(frozen=True)
class Elementwise:
    """A lossless or rounding representation of each value by itself.

    Parameters
    ----------
    dtype
        Type that travels.
    to_wire
        From float32 to the wire type, same shape.
    from_wire
        Back to float32.
    """

    dtype: np.dtype[Any]
    to_wire: Callable[[Float32Array], WireArray]
    from_wire: Callable[[WireArray], Float32Array]
    has_feedback: ClassVar[bool] = False

    def wire_type(self, shape: Sequence[int]) -> WireType:
        """Tell what travels: as many values."""
        return WireType(tuple(shape), self.dtype)

    def encode(self, values: Float32Array) -> WireArray:
        """Convert each value."""
        return self.to_wire(values)

    def decode(self, wire: WireArray, shape: Sequence[int]) -> Float32Array:
        """Convert each value back."""
        return self.from_wire(wire)


class Fp16:
    """fp16 of the values, brought to its range by a power of two of each array's own.

    Gradients are easily below fp16's smallest number, 6e-8, and would arrive as zeros.
    The power brings the largest magnitude just below 2**15: nothing saturates, values
    down to 2**-28 of the largest have all of fp16's 11 bits, and no value is off by
    more than 2**-39 of the largest, or by more than float32 can tell. Travels as fp16:
    the power's exponent, then all values.
    """

    has_feedback: ClassVar[bool] = False
    # Both are such that 2**exponent and its inverse are normal numbers of float32.
    _smallest, _largest = -126, 113

    def wire_type(self, shape: Sequence[int]) -> WireType:
        """Tell what travels: one number more than there are values."""
        return WireType((math.prod(shape) + 1,), np.dtype(np.float16))

    def encode(self, values: Float32Array) -> WireArray:
        """Divide by the power of two, which is exact, and round."""
        largest = np.abs(values).max(initial=0.0)
        # A value that is not finite stays so, and the server refuses it.
        bits = int(np.frexp(largest)[1]) if np.isfinite(largest) else 15
        exponent = max(bits - 15, self._smallest)
        with np.errstate(over="ignore"):
            scaled = (values.ravel() * np.float32(2.0**-exponent)).astype(np.float16)
        return np.concatenate([np.array([exponent], np.float16), scaled])

    def decode(self, wire: WireArray, shape: Sequence[int]) -> Float32Array:
        """Multiply by the power of two."""
        exponent = float(wire[0].item())
        if not (exponent.is_integer() and self._smallest <= exponent <= self._largest):
            raise MalformedArray(
                f"The exponent of the values' power of two is {exponent}; expected a "
                f"whole number from {self._smallest} to {self._largest}."
            )
        # What overflows here is refused as not finite.
        with np.errstate(over="ignore"):
            values = wire[1:].astype(np.float32) * np.float32(2.0**exponent)
        return values.reshape(shape)


@dataclass(frozen=True)
class TopK:
    """The values of largest magnitude alone: where they stand, and each in bfloat16.

    Travels as bytes: all positions in rising order, in the smallest unsigned type that
    can hold them, then all values.

    Parameters
    ----------
    fraction
        Share of each array's values that travels, in (0, 1]; at least one value does.
    """

    fraction: float
    has_feedback: ClassVar[bool] = True

    def wire_type(self, shape: Sequence[int]) -> WireType:
        """Tell what travels: position and value, for each value that is kept."""
        size = math.prod(shape)
        kept, position = self._kept(size), _position_type(size)
        return WireType((kept * (position.itemsize + 2),), np.dtype(np.uint8))

    def encode(self, values: Float32Array) -> WireArray:
        """Pick the largest values."""
        flat = values.ravel()
        places = where_largest(flat, self._kept(flat.size))
        positions = places.astype(_position_type(flat.size))
        return np.concatenate(
            [positions.view(np.uint8), to_bf16(flat[positions]).view(np.uint8)]
        )

    def decode(self, wire: WireArray, shape: Sequence[int]) -> Float32Array:
        """Put the values in their places; all others are 0."""
        size = math.prod(shape)
        kept, position = self._kept(size), _position_type(size)
        split = kept * position.itemsize
        positions = wire[:split].view(position).astype(np.int64)
        if kept and (positions[-1] >= size or (np.diff(positions) <= 0).any()):
            raise MalformedArray(
                f"Positions of the values must rise, and be below {size}."
            )
        flat = np.zeros(size, np.float32)
        flat[positions] = from_bf16(wire[split:].view("<u2"))
        return flat.reshape(shape)

    def _kept(self, size: int) -> int:
        return min(size, max(1, math.ceil(self.fraction * size)))


def _position_type(size: int) -> np.dtype[Any]:
    return np.min_scalar_type(max(size - 1, 0)).newbyteorder("<")


CODECS: dict[str, Codec] = {
    "fp32": Elementwise(
        np.dtype(np.float32),
        lambda values: values,
        lambda wire: wire.astype("f4", copy=False),
    ),
    "bf16": Elementwise(np.dtype(np.uint16), to_bf16, from_bf16),
    "fp16": Fp16(),
    "int8": Int8(),
    "int4": Int4(),
    "int2": Int2(),
}

# Each round's coarsest codecs that cost little time: see `allocation.codec_levels`.
AUTO = "auto"
AUTO_LADDER = ("int8", "bf16", "fp32")  # coarsest first


def codec_named(name: str) -> Codec:
    """Return the codec of that name; ``"topk:0.01"`` keeps 1 % of the values.

    Raises
    ------
    UserError
        Unknown name, or an impossible fraction; the message lists the known ones.
    """
    if name in CODECS:
        return CODECS[name]
    kind, _, text = name.partition(":")
    if kind == "topk":
        try:
            fraction = float(text)
        except ValueError:
            fraction = math.nan
        if not 0 < fraction <= 1:
            raise UserError(
                f"codec={name!r}: write the share of the values that travels, above 0 "
                "and at most 1, as in 'topk:0.01'."
            )
        return TopK(fraction)
    raise UserError(
        f"codec={name!r} is unknown; choose from {', '.join(CODECS)}, 'topk:0.01' "
        f"(any fraction) and, where each device may have its own, {AUTO!r}."
    )


def codec_ladder(name: str) -> tuple[str, ...]:
    """Return the codecs that devices may be given under a name, coarsest first.

    Raises
    ------
    UserError
        As for `codec_named`.
    """
    if name == AUTO:
        return AUTO_LADDER
    codec_named(name)
    return (name,)


@cache
def relative_error(name: str) -> float:
    """Return a codec's mean squared error, relative to the mean square of the values.

    It is that of normal values in rows of 256: heavier tails have more in "int8".
    """
    values = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    codec = codec_named(name)
    error = codec.decode(codec.encode(values), values.shape) - values
    return float(np.square(error).mean() / np.square(values).mean())


def encode_with_feedback(
    codec: Codec, gradient: Float32Array, residual: Float32Array | None = None
) -> tuple[WireArray, Float32Array | None]:
    """Encode a gradient together with what was left out of the one before.

    Parameters
    ----------
    codec
        The codec.
    gradient
        The gradient.
    residual
        What was left out before; None if nothing.

    Returns
    -------
    What travels, and what it leaves out: the sum of both, decoded, is that of gradient
    and residual. None where the codec has no feedback, or where the gradient is not
    finite (nothing of it must go into the next one).
    """
    total = gradient if residual is None else gradient + residual
    wire = codec.encode(total)
    if not codec.has_feedback:
        return wire, None
    with np.errstate(invalid="ignore"):
        left_out = total - codec.decode(wire, total.shape)
    return wire, left_out if np.isfinite(left_out).all() else None
