"""What server and device tell each other, as flat records of scalars.

Both Flower interfaces carry these records: as ``config`` and ``metrics`` of FitIns and
FitRes, or in ConfigRecords. Arrays travel beside them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from lola_flwr.errors import brief

if TYPE_CHECKING:
    # A worker may live in Python 3.10, whose typing lacks it.
    from typing import Self

Scalar = bool | bytes | float | int | str

# Under the Message API: the query for a device's profile, and the ConfigRecords that
# the profile and the report of an update come back in.
PROFILE_ACTION = "lola_profile"
PROFILE_KEY = "lola-profile"
REPORT_KEY = "lola-report"

# Under the legacy interface, where arrays have no names: the places, in the list that
# is exchanged, of those that a device is to return.
PLACES_KEY = "lola-places"

# Under the Message API: a training message about a model that is spread over devices.
PART_ACTION = "lola_part"

# A report that says why there is no update has this key; the one failure that the
# server learns more from than that there is none; and what was wrong in words.
FAILURE_KEY = "failure"
FAILURE_DETAIL_KEY = "detail"
OUT_OF_MEMORY = "out-of-memory"

# The record by which both sides recognise Flower's secure aggregation.
SECAGG_KEY = "secaggplus_configs"
SECAGG_REFUSAL = (
    "Secure aggregation hides each device's update in a sum over devices, but a block "
    "comes from one device: take the SecAgg mod and workflow out."
)

# What the projections of zeroth-order training travel as, in a report.
PROJECTION_TYPE = np.dtype("<f4")
SQUARES_TYPE = np.dtype("<f8")

# Before keys of ours, where a project's own stand beside them.
OURS = "lola-"


def unmarked(record: Mapping[str, object]) -> Mapping[str, object]:
    """Return a record whose marked keys are unmarked, in place of others of a name."""
    ours = {k.removeprefix(OURS): v for k, v in record.items() if k.startswith(OURS)}
    return {**record, **ours} if ours else record


# In the configuration of an evaluation: the manifest of its arrays, where these leave
# out what the device holds. A project does not see it.
MANIFEST_KEY = f"{OURS}manifest"


class MalformedRecord(ValueError):
    """A record lacks a field, or a field has the wrong type."""


class _Record:
    """A frozen dataclass of scalars that travels under kebab-case keys."""

    def to_record(self) -> dict[str, Scalar]:
        """Return the fields under their keys on the wire; what is None has no key."""
        values = {_key(f.name): getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return {key: value for key, value in values.items() if value is not None}

    def beside(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields beside a project's own, whose keys keep their meaning.

        The round is the same for both.
        """
        fields = self.to_record().items()
        taken = {key for key in own if key != "server-round"}
        return {**own, **{OURS * (key in taken) + key: v for key, v in fields}}

    @classmethod
    def from_record(cls, record: Mapping[str, object]) -> Self:
        """Read the fields from a received record; other keys are ignored.

        Raises
        ------
        MalformedRecord
            A field is missing that is not optional and has no default, has another
            type, or is not finite.
        """
        record = unmarked(record)
        types = {t.__name__: t for t in (bool, bytes, float, int, str)}
        values: dict[str, Any] = {}
        for field in fields(cls):  # type: ignore[arg-type]
            key, required = _key(field.name), str(field.type).removesuffix(" | None")
            if key not in record and field.default is not MISSING:
                continue
            if key not in record and required != field.type:
                values[field.name] = None
                continue
            value, expected = record.get(key), types[required]
            # An integral float arrives as int; a bool is an int in Python only.
            if expected is float and type(value) is int and abs(value) < 2**63:
                value = float(value)
            if type(value) is not expected:
                # A device's text is shortened: it goes into logs and records.
                raise MalformedRecord(
                    f"{key}={brief(value)} must be of type {expected.__name__}; "
                    f"the record has the keys {brief(sorted(map(str, record)))}."
                )
            if isinstance(value, float) and not math.isfinite(value):
                raise MalformedRecord(f"{key}={value!r} must be finite.")
            values[field.name] = value
        return cls(**values)


@dataclass(frozen=True)
class Assignment(_Record):
    """What the server asks of one device in one round.

    Parameters
    ----------
    server_round
        Round, from 1.
    block_index
        Block to train, 0 nearest the input; of several, the first.
    share
        Share of the uplink band, in (0, 1].
    batch_size
        Examples of the mini-batch.
    codec
        Name of the payload codec of the reply.
    base_fingerprint
        Digest of the server's frozen weights, which the device must hold too.
    update_names, frozen_names
        Where devices are sent the whole model and return weights: names of the
        parameters of block and head, and of those that nobody trains, one a line.
    own_names
        What the device's model calls those of ``update_names``, one a line, where it
        calls them otherwise.
    local_names
        Names in the device's model of what it trains or keeps for itself, as its own
        statistics, one a line: it is not exchanged.
    trains_all
        Whether a device that returns weights trains all that is trained, though it
        returns the block and the head alone.
    sends_head
        Whether the update is to hold the head's gradient beside the block's.
    manifest
        What the message's arrays leave out since the device holds it: a `Manifest` as
        text; None if the message holds all arrays.
    uplink_bps
        What the share is on this device's link, bit/s: the most that the upload may
        take. None where no link is known, as in a simulation.
    memory_bytes
        Memory that the block should need; None if unknown.
    direction_seed, num_directions, perturbation, smallest_share
        Where the device is to train without back-propagation: see
        ``lola_flwr.zeroth_order``. None: it back-propagates.
    projection_rank, projection_period, projection_seed
        How gradients are projected before they are encoded: see
        ``lola_flwr.wire.low_rank``. None: they are not.
    operations
        What each layer is to do, a letter each: see ``lola_flwr.d2ft.reduced``. None:
        all layers run.
    further_blocks
        Blocks to train besides, behind the first, separated by spaces; None: none.
    measures_noise
        Whether the device is to say how noisy its gradient is; None: it is not.
    components
        What of an adapter's gradient to send: see ``lola_flwr.wire.components``; None:
        all of it.
    """

    server_round: int
    block_index: int
    share: float
    batch_size: int
    codec: str
    base_fingerprint: str
    update_names: str | None = None
    frozen_names: str | None = None
    own_names: str | None = None
    local_names: str | None = None
    uplink_bps: float | None = None
    sends_head: bool = True
    manifest: str | None = None
    memory_bytes: float | None = None
    direction_seed: int | None = None
    num_directions: int | None = None
    perturbation: float | None = None
    smallest_share: float | None = None
    projection_rank: int | None = None
    projection_period: int | None = None
    projection_seed: int | None = None
    operations: str | None = None
    further_blocks: str | None = None
    trains_all: bool = False
    measures_noise: bool | None = None
    components: str | None = None

    @property
    def blocks(self) -> tuple[int, ...]:
        """Blocks to train, from the input on."""
        return (self.block_index, *map(int, (self.further_blocks or "").split()))


@dataclass(frozen=True)
class UpdateReport(_Record):
    """What a device says about the update that it sends.

    Parameters
    ----------
    server_round
        Round of the assignment that this answers.
    block_index
        Block of the assignment that this answers; of several, the first.
    update_kind
        What the arrays are. ``"gradient"``: one array, in the assignment's codec.
        ``"weights"``: those after local training, by name, in float32, since a codec
        that rounds would round most of a weight's small move away. ``"moves"``: of each
        of these what was sent less what it became, in the assignment's codec.
        ``"zeroth-order"``: there are none, and ``projections`` instead.
        ``"nothing"``: the device does not hold what the message left out.
    loss
        Mean training loss; None if unknown.
    compute_s
        Seconds from the assignment's arrival to the finished update; None if unknown.
    compute_clock
        Whether ``compute_s`` was ``"measured"`` on the device, or is ``"simulated"``.
    uplink_limit
        What holds the upload to ``uplink_bps``: ``"pacing"``, ``"tc"``, or None.
    held
        Version of the model that it holds now, as `Manifest.version` names it: messages
        may leave out what has not changed since; None if it keeps nothing.
    completes
        Whether the device completes messages of evaluation, too, from what it holds.
    peak_memory_bytes
        Memory that the training step took at its peak, weights included, as measured;
        None if it was not.
    compute_j
        Joules that sensors measured in ``compute_s``; None without any.
    direction_seed
        Seed of the directions that a zeroth-order update is about.
    projections
        The gradient's projections on these directions, float32 (<): in an array,
        Flower's records of it would be larger than they are.
    few_examples, few_square, all_examples, all_square, further_squares
        Squared norms of the gradient over some examples and over all; None: not known.
        Those of further blocks, over some, and then over all, are float64 (<).
    """

    server_round: int
    block_index: int
    update_kind: str
    loss: float | None
    compute_s: float | None
    compute_clock: str
    uplink_limit: str | None = None
    held: str | None = None
    completes: bool | None = None
    peak_memory_bytes: float | None = None
    direction_seed: int | None = None
    projections: bytes | None = None
    few_examples: int | None = None
    few_square: float | None = None
    all_examples: int | None = None
    all_square: float | None = None
    further_squares: bytes | None = None
    compute_j: float | None = None


@dataclass(frozen=True)
class PartTask(_Record):
    """What the server asks of one device where the model is spread over devices.

    A step of D2FT takes many such tasks; see ``lola_flwr.server.spread``.

    Parameters
    ----------
    kind
        ``"inputs"``: draw micro-batches, and return what the first layer is given.
        ``"forward"``: return what some of a layer's sub-networks contribute to one of
        its branches. ``"backward"``: return the gradients of that. ``"loss"``: turn
        what the last layer gave into losses. ``"return"``: return the values it holds.
    step
        Step of the training run, from 1.
    base_fingerprint
        Digest of the server's frozen weights, which the device must hold too.
    seed
        What dropout follows from; the same on both ways through a branch.
    num_groups
        Head groups that each layer is divided into.
    numbers
        Numbers of the micro-batches that this is about, separated by spaces.
    batch_size
        Examples of a micro-batch, for inputs and losses.
    sizes
        Examples and tokens of each micro-batch that the message has hidden states of:
        ``"8x21 8x17"``.
    digest
        For losses: what the device said it knows its micro-batches by.
    layer_index, branch_index, first_group, last_group
        For a branch: which layer, which of its two branches, and which of its groups,
        the last one excluded.
    rows
        For a branch: what each of these groups does, a letter each, in each of the
        micro-batches.
    wants_inputs, wants_moments
        Whether to return the gradient of the inputs, too, or the optimizer's moments.
    trainer_id
        Number of the server's trainer: what devices keep is for this one.
    version, sent_step
        For a branch: steps of the optimizer that its values are to have taken, and step
        in which the device was sent them, this one or before.
    gradient_step, scale
        For a branch: last step since then whose gradient counts, 0 without any, and
        what it is to be multiplied by.
    optimizer
        Where values are sent: what steps them, and its counts so far, as JSON.
    """

    kind: str
    step: int
    base_fingerprint: str
    seed: int
    num_groups: int
    numbers: str = ""
    batch_size: int = 0
    sizes: str = ""
    digest: str = ""
    layer_index: int = 0
    branch_index: int = 0
    first_group: int = 0
    last_group: int = 0
    rows: str = ""
    wants_inputs: bool = True
    wants_moments: bool = False
    trainer_id: int = 0
    version: int = 0
    sent_step: int = 0
    gradient_step: int = 0
    scale: float = 1.0
    optimizer: str = ""


@dataclass(frozen=True)
class PartReport(_Record):
    """What a device says about the part of a step that it did.

    Parameters
    ----------
    kind, step, layer_index, branch_index
        Those of the task.
    sizes
        For inputs: examples and tokens of each micro-batch.
    digest
        For inputs: a digest of the micro-batches, by which the device tells whether it
        drew the same ones when it comes to their losses.
    losses
        For losses: the mean loss of each micro-batch, float32, little-endian.
    weights
        For losses: what each of them is a mean over, examples or tokens: ``"8 8"``.
    squares, magnitudes
        For gradients: the sum of the squares of what each group has of its own, and of
        the magnitudes of the values that they are of, float64, little-endian.
    lacks
        What the device does not have and could not do without: ``"values"`` that it
        held, or ``"inputs"`` that it was sent on the way forward.
    """

    kind: str
    step: int
    layer_index: int = 0
    branch_index: int = 0
    sizes: str = ""
    digest: str = ""
    losses: bytes = b""
    weights: str = ""
    squares: bytes = b""
    magnitudes: bytes = b""
    lacks: str = ""


def holds_nothing(report: Mapping[str, object]) -> bool:
    """Tell whether a report says that its device did not train: it took no time."""
    return FAILURE_KEY in report or report.get("update-kind") == "nothing"


def _key(field_name: str) -> str:
    return field_name.replace("_", "-")
