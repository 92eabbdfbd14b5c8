"""One round of LoLa-DEFT on the server: plan it, take its replies in, step the model.

The coordinator knows neither of Flower's two strategy interfaces; each is a thin
adapter that carries its plans out and hands it the replies as bytes and records.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lola_flwr.absences import Absences
from lola_flwr.allocation import (
    RANDOM_ALLOCATORS,
    Allocation,
    AllocationProblem,
    Allocator,
    InfeasibleAllocation,
    RoundMode,
    allocate,
    find_allocator,
    refine_payloads,
    rotate,
)
from lola_flwr.assembly import BlockUpdate, block_mean_named
from lola_flwr.blocks import BlockPartition
from lola_flwr.candidates import narrowed
from lola_flwr.checkpoint import Snapshot
from lola_flwr.d2ft.reduced import from_text, reduced_costs, to_text
from lola_flwr.d2ft.rescue import Schedules, with_reduced_schedules
from lola_flwr.errors import UserError
from lola_flwr.low_rank import LowRankProjection
from lola_flwr.low_rank_optimizer import LowRankOptimizer
from lola_flwr.norm_limits import NormHistory
from lola_flwr.payload import HeadPolicy, Payloads, Uplink, array_bytes
from lola_flwr.protocol import OUT_OF_MEMORY, Assignment, UpdateReport
from lola_flwr.randomness import rng_for
from lola_flwr.replies import DeviceReply, UpdateReader, UpdateRefused, Upload
from lola_flwr.round_log import BlockRecord, RoundRecord
from lola_flwr.run_state import RunState
from lola_flwr.running_statistics import (
    average_statistics,
    statistics_names,
    within_bounds,
)
from lola_flwr.selection.chooser import BlockChooser, Selection
from lola_flwr.selection.importance import Response
from lola_flwr.server_optimizer import ServerOptimizer
from lola_flwr.system.channel import uplink_rates_bps
from lola_flwr.system.costs import BlockCosts
from lola_flwr.system.devices import DeviceProfile, InvalidProfile
from lola_flwr.system.estimation import (
    ComputeEstimate,
    Observation,
    RateEstimate,
    RateObservation,
)
from lola_flwr.versions import HeldVersions, Manifest, model_pieces
from lola_flwr.zeroth_order.mixing import BoolArray, FloatArray, ZerothOrder, mix


@dataclass(frozen=True, eq=False)
class RoundPlan:
    """Who computes what in one round.

    Parameters
    ----------
    server_round
        Round, from 1.
    device_ids
        The K devices in the order of the problem's rows.
    num_excluded
        Devices that were left out where all others take part: they have not the memory
        for a block, or rest after failures.
    problem, allocation
        What was solved, and the solution.
    assignments
        Assignment of each active device, by device id.
    payloads
        What the devices may be told to upload.
    codec_level
        Codec of each device, an index into ``payloads.codecs``, shape (K,).
    manifests
        Which of the coordinator's arrays each active device is sent, by device id;
        without one a device is sent all of them.
    """

    server_round: int
    device_ids: tuple[str, ...]
    num_excluded: int
    problem: AllocationProblem
    allocation: Allocation
    assignments: Mapping[str, Assignment]
    payloads: Payloads
    codec_level: npt.NDArray[np.int64]
    manifests: Mapping[str, Manifest]

    def sent_names(self, device_id: str, names: Sequence[str]) -> list[str]:
        """Return the names, out of all in order, of what a device is sent."""
        manifest = self.manifests.get(device_id)
        return (
            [*names]
            if manifest is None
            else [names[i] for i in manifest.sent_positions]
        )


@dataclass(frozen=True, eq=False)
class _StatedProblem:
    """A round's problem, and what it assumes of the K devices.

    Parameters
    ----------
    problem
        The problem of all wanted blocks.
    rate_bps
        Rate of each device over the whole band, bit/s, shape [K].
    required_bytes
        Memory that each device takes for each block, shape [K, N].
    without_backward
        Who is to train by forward passes alone, shape [K].
    schedules
        What the layers are to do, where a device is to do less than all.
    """

    problem: AllocationProblem
    rate_bps: FloatArray
    required_bytes: FloatArray
    without_backward: BoolArray
    schedules: Schedules

    def operations(self, row: int, block: int) -> str | None:
        """Return what an assignment says about the layers; None: all run."""
        if self.without_backward[row] or (row, block) not in self.schedules:
            return None
        return to_text(self.schedules[row, block])


class Coordinator:
    """The server's side of LoLa-DEFT, apart from any transport.

    Parameters
    ----------
    partition
        Blocks of the model.
    costs
        What each block costs a device.
    bandwidth_hz
        Total uplink bandwidth.
    optimizer
        Holds the trainable values of the model, and steps them.
    base_fingerprint
        Digest of the frozen weights, which every device must hold.
    allocator
        Name of an allocator, ``"package.module:function"``, or a function from problem
        to allocation.
    mode
        Which blocks need how many devices (default: every block one).
    selection
        Which blocks of these a round trains (default: all of them).
    response
        Gives the loss that the model has with some trainable values on data of the
        server's, for a selection by importance.
    zeroth_order
        How devices without the memory for back-propagation are used (default: they are
        not).
    low_rank
        How devices project their gradients before they send them; the optimizer is
        then one that steps in the projected space (default: they do not).
    reduced_schedules
        Whether a device may take a block that its memory or the latency target does not
        allow, by running some layers forward only or not at all. Its gradient is then
        biased.
    rotation_eps
        Relative latency that may be given up for letting blocks meet other devices'
        data; 0 turns rotation off.
    correct_profiles
        Whether reported compute times correct the planned ones of later rounds, and
        measured uploads the stated rates of links.
    batch_size
        Examples of a device's mini-batch; no reply can weigh more. (A device that
        returns weights may have trained on any number.)
    max_gradient_norm
        Every update whose Euclidean norm is larger is scaled down to this: one device
        cannot throw the optimizer's moments out for all.
    norm_factor
        So is, to this many times the median of its block's latest norms, every update
        that is larger than that; infinite turns it off.
    block_mean
        How the updates of one block, and of the head, are put together: "mean", or one
        that a few hostile devices cannot move, "median" or "trimmed".
    longest_round_s
        A device that would need longer for a block, had it the whole band to itself, is
        not given that block.
    codec
        Name of the codec that gradients travel in; ``"auto"`` gives each device the
        finest that costs the round little, see ``codec_slack``.
    codec_slack
        With ``codec="auto"``: relative latency that may be given up for finer codecs
        than the coarsest; see `lola_flwr.allocation.payloads`.
    head
        Which devices send the head's gradient, which all have computed: ``"every"``
        one, that of the ``"shallowest"`` block, or ``"rotating"`` from block to block.
    downlink
        ``"all"``: devices are sent all arrays in every round. ``"changed"``: those that
        keep a copy are sent what has changed since.
    state_dict
        All arrays of the model in the order to send them in, where devices do not hold
        the frozen ones themselves (default: the trainable ones alone are sent). Only
        trainable ones and running statistics ever change.
    assumed_profile
        Profile of devices that report none, but for its name (default: such devices
        are left out).
    broadcast_s, server_s
        Constant parts of every round: downlink and server time.
    seed
        Seed of the run: channel draws and random allocators follow from it.
    """

    def __init__(
        self,
        *,
        partition: BlockPartition,
        costs: BlockCosts,
        bandwidth_hz: float,
        optimizer: ServerOptimizer | LowRankOptimizer,
        base_fingerprint: str,
        allocator: str | Allocator = "exact",
        mode: RoundMode | None = None,
        selection: Selection | None = None,
        response: Response | None = None,
        zeroth_order: ZerothOrder | None = None,
        low_rank: LowRankProjection | None = None,
        reduced_schedules: bool = False,
        rotation_eps: float = 0.0,
        correct_profiles: bool = True,
        batch_size: int = 32,
        max_gradient_norm: float = 10.0,
        norm_factor: float = 10.0,
        block_mean: str = "mean",
        longest_round_s: float = 3600.0,
        codec: str = "fp32",
        codec_slack: float = 0.1,
        head: HeadPolicy = "every",
        downlink: Literal["all", "changed"] = "all",
        state_dict: Mapping[str, npt.NDArray[Any]] | None = None,
        assumed_profile: DeviceProfile | None = None,
        broadcast_s: float = 0.0,
        server_s: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.partition = partition
        self._costs = costs
        self._bandwidth_hz = bandwidth_hz
        self._optimizer = optimizer
        self._base_fingerprint = base_fingerprint
        if isinstance(allocator, str):
            find_allocator(allocator)  # an unknown name is an error now, not in round 1
        self._allocator = allocator
        self._mode = RoundMode() if mode is None else mode
        self._chooser = BlockChooser(
            partition,
            Selection() if selection is None else selection,
            start=optimizer.state(),
            response=response,
            seed=seed,
        )
        self._zeroth_order = zeroth_order
        self._low_rank = low_rank
        self._reduced_schedules = reduced_schedules
        self._latency_target_s = (
            math.inf if selection is None else selection.latency_target_s
        )
        self._rotation_eps = rotation_eps
        self._correct_profiles = correct_profiles
        self._batch_size = batch_size
        self._sends_model = state_dict is not None
        # The optimizer holds the trainable values: no second copy of them is kept.
        state = optimizer.state()
        self._state_dict = {
            name: state[name] if name in state and own.dtype == np.float32 else own
            for name, own in (state if state_dict is None else state_dict).items()
        }
        missing = [name for name in partition.trainable if name not in self._state_dict]
        if missing:
            raise UserError(
                f"state_dict lacks {missing[0]}, which is to be trained; pass that of "
                "the whole model."
            )
        self._reader = UpdateReader(
            partition, tuple(self._state_dict), max_gradient_norm, norm_factor
        )
        if not codec_slack >= 0:
            raise UserError(f"codec_slack={codec_slack} must be at least 0.")
        self._codec_slack = codec_slack
        self._uplink = Uplink(
            partition,
            {
                name: values.shape if low_rank is None else low_rank.shape(values.shape)
                for name, values in optimizer.state().items()
            },
            codec,
            head,
            statistics_bytes=sum(
                array_bytes(name, self._state_dict[name].nbytes)
                for name in statistics_names(self._state_dict)
            ),
        )
        if downlink not in ("all", "changed"):
            raise UserError(f"downlink={downlink!r} must be 'all' or 'changed'.")
        self._held = self._held_versions() if downlink == "changed" else None
        self._assemble = block_mean_named(block_mean)
        self._longest_round_s = longest_round_s
        self._assumed_profile = assumed_profile
        self._constant_s = broadcast_s + server_s
        self._seed = seed
        self._profiles: dict[str, DeviceProfile] = {}
        self._wireless_s = 0.0
        self._estimate = ComputeEstimate()
        self._rates = RateEstimate()
        # How often a device's update of a block was accepted, by name and block.
        self._meetings: Counter[tuple[str, int]] = Counter()
        self._absences = Absences()
        self._norms = NormHistory()
        self.server_round = 0  # the last complete one

    # --- devices ---------------------------------------------------------------------

    def meet_devices(self, device_ids: Iterable[str]) -> list[str]:
        """Take note of who is there; return those whose profile is not known yet.

        The profiles of devices that are gone are forgotten: a device that comes back
        under another id may use its name again.
        """
        there = list(device_ids)
        self._profiles = {d: self._profiles[d] for d in there if d in self._profiles}
        if self._held is not None:
            self._held.keep_only(there)
        return [device for device in there if device not in self._profiles]

    def add_device(self, device_id: str, properties: Mapping[str, object]) -> None:
        """Take in the profile that a device reported; none if it is empty.

        Raises
        ------
        InvalidProfile
            The profile cannot be believed, or its name belongs to another device.
        """
        own_name = f"node {device_id}"[:64]
        if not properties and self._assumed_profile is not None:
            profile = replace(self._assumed_profile, name=own_name)
        else:
            profile = DeviceProfile.from_properties(properties)
        if profile.name.startswith("node ") and profile.name != own_name:
            raise InvalidProfile(
                f"name={profile.name!r} is reserved for the device of that id; give "
                "this one another."
            )
        for other_id, other in self._profiles.items():
            if other.name == profile.name and other_id != device_id:
                raise InvalidProfile(
                    f"name={profile.name!r} is taken by another device; give each "
                    "device a name of its own."
                )
        self._profiles[device_id] = profile

    def draw_evaluators(
        self, server_round: int, device_ids: Iterable[str], count: int
    ) -> list[str]:
        """Draw devices to evaluate the model: a function of seed, round and names."""
        names = {d: self._profiles[d].name for d in self._profiles}
        ordered = sorted(device_ids, key=lambda device: names.get(device, device))
        rng = rng_for(self._seed, "evaluation", server_round)
        drawn = rng.permutation(len(ordered))[:count]
        return [ordered[index] for index in sorted(drawn)]

    # --- rounds ----------------------------------------------------------------------

    def plan_round(self, server_round: int, device_ids: Iterable[str]) -> RoundPlan:
        """Draw the channel and give out blocks and bandwidth.

        Parameters
        ----------
        server_round
            Round, from 1.
        device_ids
            Devices that are there. Those without a known profile are left out, and so
            are, where all others must take part, those that can hold no block. Once a
            round has been completed, blocks are left out that there is no device for.

        Raises
        ------
        InfeasibleAllocation
            The devices cannot compute all blocks, or none has a usable profile.
        """
        known = [device for device in device_ids if device in self._profiles]
        # Ids differ from run to run; names do not, and make runs repeatable.
        known.sort(key=lambda device: self._profiles[device].name)
        if not known:
            raise InfeasibleAllocation(
                "No device has reported a usable profile; see the warnings above."
            )
        profiles = [self._profiles[device] for device in known]
        names = [profile.name for profile in profiles]
        stated = self._problem(server_round, profiles)
        required_bytes, rate_bps = stated.required_bytes, stated.rate_bps
        wanted = self._chooser.narrow(
            stated.problem, server_round, self._optimizer.state()
        )
        wanted, _ = self._with_payloads(
            server_round, wanted, rate_bps, stated.without_backward
        )
        rows, problem = narrowed(
            wanted,
            longest_s=self._longest_round_s,
            required_bytes=required_bytes,
            memory_limit_bytes=np.array(
                [self._absences.memory_limit(server_round, name) for name in names]
            ),
            failures=[self._absences.failures(name) for name in names],
            block_updates=self._block_updates(),
            partial=self.server_round > 0,
        )
        able = [known[row] for row in rows]
        names = [names[row] for row in rows]
        # Who sends the head depends on which blocks are trained after all.
        problem, payloads = self._with_payloads(
            server_round, problem, rate_bps[rows], stated.without_backward[rows]
        )
        options: dict[str, Any] = {}
        if self._allocator in RANDOM_ALLOCATORS:
            rng = rng_for(self._seed, "matching", server_round)
            options["seed"] = int(rng.integers(2**31))
        allocation = allocate(problem, self._allocator, **options)
        if self._rotation_eps > 0:
            blocks = range(self.partition.num_blocks)
            meetings = [[self._meetings[name, n] for n in blocks] for name in names]
            allocation = rotate(problem, allocation, meetings, eps=self._rotation_eps)
        problem, allocation, codec_level = refine_payloads(
            problem, allocation, payloads.bits, slack=self._codec_slack
        )
        allocation.check(problem)
        upload_s = allocation.upload_s(problem)
        active = np.flatnonzero(allocation.block_of_device >= 0)
        manifests = self._manifests([able[row] for row in active])
        assignments = {}
        for row in active:
            device, block = able[row], int(allocation.block_of_device[row])
            manifest = manifests.get(device)
            sends_head = bool(payloads.sends_head[block])
            assignments[device] = Assignment(
                server_round=server_round,
                block_index=block,
                share=float(allocation.share[row]),
                batch_size=self._batch_size,
                codec=payloads.codecs[codec_level[row]],
                base_fingerprint=self._base_fingerprint,
                sends_head=sends_head,
                manifest=None if manifest is None else manifest.to_text(),
                **self._names(block, sends_head),
                # Only a link whose rate is known can be held to a part of it.
                uplink_bps=(
                    None
                    if self._profiles[device].uplink_bps is None
                    else float(
                        problem.full_band_upload_s[row, block]
                        * rate_bps[rows[row]]
                        / upload_s[row]
                    )
                ),
                memory_bytes=float(required_bytes[rows[row], block]),
                **self._directions(
                    stated.without_backward[rows[row]], server_round, names[row]
                ),
                **(
                    {} if self._low_rank is None else self._low_rank.assignment_fields()
                ),
                operations=stated.operations(int(rows[row]), block),
            )
        return RoundPlan(
            server_round=server_round,
            device_ids=tuple(able),
            num_excluded=len(known) - len(able),
            problem=problem,
            allocation=allocation,
            assignments=assignments,
            payloads=payloads,
            codec_level=codec_level,
            manifests=manifests,
        )

    def complete_round(
        self, plan: RoundPlan, replies: Iterable[DeviceReply]
    ) -> RoundRecord:
        """Check the replies, assemble the gradient of those that hold, and step.

        Parameters
        ----------
        plan
            The round's plan.
        replies
            Replies received. Blocks without a usable one keep their values.

        Returns
        -------
        RoundRecord
            What happened, for the log.
        """
        updates: dict[str, BlockUpdate] = {}
        reports: dict[str, UpdateReport] = {}
        uploads: dict[str, Upload] = {}
        refusals: dict[str, str] = {}
        refused: dict[str, int] = {}
        sent = self.arrays()
        # Of each device that was asked: None, or the memory that it turned out to lack.
        outcomes: dict[str, float | None] = dict.fromkeys(plan.assignments, 0.0)
        for reply in replies:
            try:
                if reply.device_id in updates:
                    raise UpdateRefused("duplicate", "the device replied before")
                update, report = self._reader.read(
                    reply,
                    plan.assignments.get(reply.device_id),
                    sent,
                    self._norms,
                )
            except UpdateRefused as refusal:
                refused[refusal.reason] = refused.get(refusal.reason, 0) + 1
                if refusal.reason == "lost-copy" and self._held is not None:
                    self._held.forget(reply.device_id)
                refusals.setdefault(reply.device_id, str(refusal))
                if refusal.reason == OUT_OF_MEMORY:
                    asked = plan.assignments[reply.device_id]
                    outcomes[reply.device_id] = asked.memory_bytes
                continue
            outcomes[reply.device_id] = None
            updates[reply.device_id] = update
            reports[reply.device_id] = report
            uploads[reply.device_id] = Upload.of(
                reply, len(update.gradients) + len(update.statistics)
            )
        if updates:
            # In the plan's order, so that the sum does not depend on who came first.
            ordered = [updates[d] for d in plan.device_ids if d in updates]
            blocks = [reports[device].block_index for device in updates]
            self._step(plan.server_round, ordered, blocks)
            self._state_dict |= average_statistics(ordered)
        records = self._block_records(plan, reports, refusals, uploads)
        observed_s = self._constant_s + max(
            (
                block.upload_s
                if block.measured_upload_s is None
                else block.measured_upload_s
            )
            + (
                block.compute_s
                if block.reported_compute_s is None
                else block.reported_compute_s
            )
            for block in records
        )
        self._wireless_s += observed_s
        self._learn_from(plan, reports, uploads)
        self._absences = self._absences.after(
            plan.server_round,
            {self._profiles[d].name: lacked for d, lacked in outcomes.items()},
        )
        self._norms = self._norms.after(
            (plan.assignments[d].block_index, updates[d].norm)
            for d in plan.device_ids
            if d in updates and not updates[d].zeroth_order
        )
        self.server_round = plan.server_round
        losses = {
            d: report.loss for d, report in reports.items() if report.loss is not None
        }
        weights = [updates[device].num_examples for device in losses]
        return RoundRecord(
            server_round=plan.server_round,
            num_devices=len(plan.device_ids),
            num_excluded=plan.num_excluded,
            round_s=plan.allocation.round_s,
            observed_s=observed_s,
            bound_s=plan.allocation.bound_s,
            wireless_s=self._wireless_s,
            train_loss=(
                float(np.average(list(losses.values()), weights=weights))
                if losses
                else None
            ),
            refused=refused,
            blocks=records,
        )

    def skip_round(self, server_round: int, reason: str) -> RoundRecord:
        """Return the record of a round that nobody was asked to take part in."""
        self.server_round = server_round
        return RoundRecord(
            server_round=server_round,
            num_devices=len(self._profiles),
            wireless_s=self._wireless_s,
            skipped=reason,
        )

    def state(self) -> dict[str, npt.NDArray[np.float32]]:
        """Return the trainable parameters' current values, as views."""
        return self._optimizer.state()

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return what devices are sent, by name in the order of sending.

        The server steps in float32; what it sends has the types of the state dict.
        """
        state = self._optimizer.state()
        return {
            name: state[name].astype(own.dtype, copy=False) if name in state else own
            for name, own in self._state_dict.items()
        }

    def constants(self) -> dict[str, npt.NDArray[Any]]:
        """Return those of the arrays that never change, by name."""
        changing = {*self._optimizer.state(), *statistics_names(self._state_dict)}
        return {n: v for n, v in self._state_dict.items() if n not in changing}

    def start_from(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Take in the values to start from.

        Raises
        ------
        UserError
            They are not those of this model, or frozen ones differ.
        """
        own, constants = self.arrays(), self.constants()
        if set(arrays) != set(own):
            name = min(set(arrays) ^ set(own))
            raise UserError(
                f"Initial arrays: {name} is {'missing' if name in own else 'unknown'}; "
                "pass the arrays of the model that the coordinator was made for."
            )
        for name, array in arrays.items():
            if array.shape != own[name].shape:
                raise UserError(
                    f"Initial arrays: {name} has shape {array.shape}; expected "
                    f"{own[name].shape}."
                )
            if name in constants and not np.array_equal(array, own[name]):
                raise UserError(
                    f"Initial arrays: {name}, which nobody trains, differs from that "
                    "of the model that the coordinator was made for; load the same "
                    "weights for both."
                )
        self.adopt(arrays)

    def adopt(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Take in values that something around the strategy has changed."""
        self._optimizer.load(arrays)
        for name in statistics_names(self._state_dict):
            own = self._state_dict[name]
            self._state_dict[name] = within_bounds(name, arrays[name], own.dtype)

    def snapshot(self) -> Snapshot:
        """Return all that the rounds to come depend on, to be saved between rounds."""
        state = RunState(
            server_round=self.server_round,
            wireless_s=self._wireless_s,
            profiles=self._profiles,
            estimate=self._estimate,
            rates=self._rates,
            meetings=self._meetings,
            history=self._chooser.history,
            absences=self._absences,
            norms=self._norms,
        )
        model = self._optimizer.snapshot()
        statistics = {
            f"statistics/{name}": self._state_dict[name]
            for name in statistics_names(self._state_dict)
        }
        return Snapshot(
            {**model.arrays, **statistics},
            {
                "base_fingerprint": self._base_fingerprint,
                "optimizer": model.values,
                "state": state.to_values(),
            },
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot, in a coordinator made with the same arguments.

        Raises
        ------
        UserError
            The snapshot is of another model.
        """
        if snapshot.values["base_fingerprint"] != self._base_fingerprint:
            raise UserError(
                "The checkpoint is of a model with other frozen weights; use the "
                "model, revision and seed that it was made with."
            )
        self._optimizer.restore(Snapshot(snapshot.arrays, snapshot.values["optimizer"]))
        for name in statistics_names(self._state_dict):
            self._state_dict[name] = snapshot.arrays[f"statistics/{name}"]
        state = RunState.from_values(snapshot.values["state"])
        self.server_round = state.server_round
        self._wireless_s = state.wireless_s
        self._profiles = dict(state.profiles)
        self._estimate = state.estimate
        self._rates = state.rates
        self._meetings = state.meetings
        self._chooser.history = state.history
        self._absences = state.absences
        self._norms = state.norms

    # --- parts -----------------------------------------------------------------------

    def _with_payloads(
        self,
        server_round: int,
        problem: AllocationProblem,
        rate_bps: npt.NDArray[np.float64],
        without_backward: BoolArray,
    ) -> tuple[AllocationProblem, Payloads]:
        """Return the problem with the times that its blocks' payloads take."""
        payloads = self._uplink.payloads(server_round, problem.demand > 0)
        upload_s = np.where(
            without_backward[:, None],
            problem.full_band_upload_s,
            payloads.bits[0] / rate_bps[:, None],
        )  # [K, N]
        return replace(problem, full_band_upload_s=upload_s), payloads

    def _block_updates(self) -> list[int]:
        """Return how many updates of each block have been accepted, [N]."""
        updates: Counter[int] = Counter()
        for (_, block), count in self._meetings.items():
            updates[block] += count
        return [updates[block] for block in range(self.partition.num_blocks)]

    def _step(
        self, server_round: int, updates: Sequence[BlockUpdate], blocks: Sequence[int]
    ) -> None:
        """Step the model by gradients, and past the optimizer by estimates of them."""
        gradient = self._assemble([u for u in updates if not u.zeroth_order])
        estimate = self._assemble([u for u in updates if u.zeroth_order])
        state = self._optimizer.state()
        self._chooser.before_step({name: state[name] for name in gradient | estimate})
        if gradient:
            self._optimizer.step(gradient, server_round)
        if self._zeroth_order is not None:
            rate = np.float32(self._zeroth_order.lr)
            self._optimizer.shift({name: -rate * g for name, g in estimate.items()})
        self._chooser.after_step(server_round, blocks, state)

    def _costs_of(self, without_backward: bool) -> BlockCosts:
        """Return the costs of a device that does, or does not, back-propagate."""
        if self._zeroth_order is None or not without_backward:
            return self._costs
        return self._zeroth_order.costs

    def _directions(
        self, without_backward: np.bool_, server_round: int, device_name: str
    ) -> dict[str, Any]:
        if self._zeroth_order is None or not without_backward:
            return {}
        return self._zeroth_order.directions_for(self._seed, server_round, device_name)

    def _names(self, block_index: int, sends_head: bool) -> dict[str, Any]:
        """Return what devices are told of the blocks, where they are sent the model."""
        if not self._sends_model:
            return {}
        return {
            "update_names": "\n".join(
                self.partition.update_names(block_index, head=sends_head)
            ),
            "frozen_names": "\n".join(self.partition.frozen),
        }

    def _problem(
        self, server_round: int, profiles: Sequence[DeviceProfile]
    ) -> _StatedProblem:
        """State the problem of all blocks that the run's mode names."""
        wanted = np.ones(self.partition.num_blocks, bool)
        payloads = self._uplink.payloads(server_round, wanted)
        speed = np.array([profile.flops_per_s for profile in profiles])
        memory_bytes = np.array([profile.memory_bytes for profile in profiles])
        rate_bps = self._rates.correct(
            uplink_rates_bps(
                profiles,
                bandwidth_hz=self._bandwidth_hz,
                server_round=server_round,
                seed=self._seed,
            ),
            [profile.name for profile in profiles],
        )
        claimed_s = self._costs.flops[None, :] / speed[:, None]  # [K, N]
        required_bytes = self._costs.required_bytes(profiles)  # [K, N]
        problem = AllocationProblem(
            self._estimate.correct(claimed_s, [profile.name for profile in profiles]),
            payloads.bits[0] / rate_bps[:, None],
            required_bytes <= memory_bytes[:, None],
            memory_bytes=memory_bytes,
            required_memory_bytes=required_bytes.min(axis=0),
            device_names=[profile.name for profile in profiles],
            constant_s=self._constant_s,
            mode=self._mode,
        )
        schedules: Schedules = {}
        if self._reduced_schedules:
            problem, schedules = with_reduced_schedules(
                problem, self._costs, latency_target_s=self._latency_target_s
            )
        mixed, without_backward = mix(
            problem,
            self._zeroth_order,
            profiles,
            rate_bps=rate_bps,
            correct=self._estimate.correct,
        )
        for (row, block), operations in schedules.items():
            required_bytes[row, block] = reduced_costs(self._costs, block, operations)[
                1
            ]
        required_bytes[without_backward] = self._costs_of(True).memory_bytes
        return _StatedProblem(
            mixed, rate_bps, required_bytes, without_backward, schedules
        )

    def _held_versions(self) -> HeldVersions:
        constants = self.constants()
        names = tuple(self._state_dict)
        return HeldVersions(
            model_pieces(self.partition, names),
            {i: constants[name] for i, name in enumerate(names) if name in constants},
        )

    def _manifests(self, device_ids: Sequence[str]) -> dict[str, Manifest]:
        if self._held is None:
            return {}
        return self._held.manifests(device_ids, [*self.arrays().values()])

    def _learn_from(
        self,
        plan: RoundPlan,
        reports: Mapping[str, UpdateReport],
        uploads: Mapping[str, Upload],
    ) -> None:
        """Take accepted updates into the profiles' correction and the rotation."""
        observations = []
        rates = []
        for device, report in reports.items():
            if self._held is not None:
                self._held.acknowledge(device, plan.manifests[device], report.held)
            profile = self._profiles[device]
            self._meetings[profile.name, report.block_index] += 1
            upload_s = uploads[device].upload_s
            if profile.uplink_bps is not None and upload_s is not None:
                rates.append(
                    RateObservation(
                        device=profile.name,
                        claimed_bps=profile.uplink_bps,
                        payload_bits=uploads[device].payload_bits,
                        upload_s=upload_s,
                        share=plan.assignments[device].share,
                        held=report.uplink_limit is not None,
                    )
                )
            if report.compute_s is None:
                continue
            costs = self._costs_of(report.direction_seed is not None)
            flops = float(costs.flops[report.block_index])
            operations = plan.assignments[device].operations
            if operations is not None:
                flops, _ = reduced_costs(
                    costs, report.block_index, from_text(operations)
                )
            claimed_s = flops / profile.flops_per_s
            observations.append(
                Observation(
                    profile.name, report.block_index, claimed_s, report.compute_s
                )
            )
        if self._correct_profiles:
            self._estimate = self._estimate.update(observations)
            self._rates = self._rates.update(rates)

    def _block_records(
        self,
        plan: RoundPlan,
        reports: Mapping[str, UpdateReport],
        refusals: Mapping[str, str],
        uploads: Mapping[str, Upload],
    ) -> tuple[BlockRecord, ...]:
        records = []
        payloads = plan.payloads
        nbytes = {name: values.nbytes for name, values in self._state_dict.items()}
        upload_s = plan.allocation.upload_s(plan.problem)
        for row, device in enumerate(plan.device_ids):
            block = int(plan.allocation.block_of_device[row])
            if block < 0:
                continue
            profile = self._profiles[device]
            report = reports.get(device)
            sent = uploads.get(device)
            level = plan.codec_level[row]
            status = "accepted" if report else refusals.get(device, "no reply")
            records.append(
                BlockRecord(
                    block_index=block,
                    depth=self.partition.depth(block),
                    device=profile.name,
                    share=float(plan.allocation.share[row]),
                    compute_s=float(plan.problem.compute_s[row, block]),
                    upload_s=float(upload_s[row]),
                    reported_compute_s=report.compute_s if report else None,
                    compute_clock=report.compute_clock if report else "",
                    loss=report.loss if report else None,
                    status=status,
                    ignored_arrays=sent.ignored_arrays if sent else 0,
                    measured_upload_s=sent.upload_s if sent else None,
                    uplink_limit=report.uplink_limit if report else None,
                    codec=payloads.codecs[level],
                    payload_bytes=int(payloads.bits[level, block]) // 8,
                    received_bytes=int(sent.payload_bits) // 8 if sent else 0,
                    sent_bytes=sum(
                        nbytes[name] for name in plan.sent_names(device, [*nbytes])
                    ),
                    required_memory_bytes=float(
                        self._costs.required_bytes([profile])[0, block]
                    ),
                    memory_bytes=profile.memory_bytes,
                    peak_memory_bytes=report.peak_memory_bytes if report else None,
                )
            )
        return tuple(sorted(records, key=lambda record: record.block_index))
