"""One round of LoLa-DEFT on the server: plan it, take its replies in, step the model.

The coordinator knows neither of Flower's two strategy interfaces; each is a thin
adapter that carries its plans out and hands it the replies as bytes and records.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lola_flwr.allocation import Allocator, RoundMode
from lola_flwr.costs.estimated import BlockCosts
from lola_flwr.errors import UserError
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.run.checkpoint import Snapshot
from lola_flwr.run.records import RoundRecord
from lola_flwr.server.fleet import Fleet
from lola_flwr.server.low_rank_optimizer import LowRankOptimizer
from lola_flwr.server.model import ServedModel
from lola_flwr.server.norm_limits import NormHistory, NormLimits
from lola_flwr.server.optimizer import ServerOptimizer
from lola_flwr.server.replies import DeviceReply, UpdateReader
from lola_flwr.server.round.intake import read_replies
from lola_flwr.server.round.plan import RoundPlan
from lola_flwr.server.round.planner import RoundPlanner
from lola_flwr.server.round.problem import ProblemStatement
from lola_flwr.server.round.record import round_record
from lola_flwr.server.selection.chooser import BlockChooser, Selection
from lola_flwr.server.selection.importance import Response
from lola_flwr.server.state import RunState
from lola_flwr.system.devices import DeviceProfile
from lola_flwr.wire.low_rank import LowRankProjection
from lola_flwr.wire.payload import HeadPolicy, Uplink
from lola_flwr.zeroth_order.mixing import ZerothOrder


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
        that is larger than that; one ten times as large again is refused. Infinite
        turns both off.
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
        than the coarsest; see `lola_flwr.allocation.codec_levels`.
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
        if downlink not in ("all", "changed"):
            raise UserError(f"downlink={downlink!r} must be 'all' or 'changed'.")
        selection = Selection() if selection is None else selection
        mode = RoundMode() if mode is None else mode
        selection.check(mode)
        self.partition = partition
        self.server_round = 0  # the last complete one
        self._wireless_s = 0.0
        self._norms = NormHistory()
        self._model = ServedModel(
            partition,
            optimizer,
            base_fingerprint=base_fingerprint,
            state_dict=state_dict,
            block_mean=block_mean,
            zeroth_order_lr=0.0 if zeroth_order is None else zeroth_order.lr,
        )
        self._fleet = Fleet(
            assumed_profile=assumed_profile,
            correct_profiles=correct_profiles,
            held=self._model.held_versions() if downlink == "changed" else None,
            seed=seed,
        )
        start = self._model.state()
        self._chooser = BlockChooser(
            partition, selection, start=start, response=response, seed=seed
        )
        uplink = Uplink(
            partition,
            {
                name: values.shape if low_rank is None else low_rank.shape(values.shape)
                for name, values in start.items()
            },
            codec,
            head,
            by_name=self._model.is_sent_whole,
            statistics_bytes=self._model.statistics_bytes(),
        )
        self._statement = ProblemStatement(
            partition=partition,
            costs=costs,
            uplink=uplink,
            bandwidth_hz=bandwidth_hz,
            mode=mode,
            zeroth_order=zeroth_order,
            reduced_schedules=reduced_schedules,
            latency_target_s=selection.latency_target_s,
            constant_s=broadcast_s + server_s,
            seed=seed,
        )
        self._planner = RoundPlanner(
            statement=self._statement,
            allocator=allocator,
            low_rank=low_rank,
            rotation_eps=rotation_eps,
            batch_size=batch_size,
            longest_round_s=longest_round_s,
            codec_slack=codec_slack,
        )
        names = tuple(self._model.nbytes())
        self._reader = UpdateReader(partition, names, max_gradient_norm)
        self._limits = NormLimits(max_gradient_norm, norm_factor)

    # --- devices ---------------------------------------------------------------------

    def meet_devices(self, device_ids: Iterable[str]) -> list[str]:
        """Take note of who is there; return those whose profile is not known yet."""
        return self._fleet.meet(device_ids)

    def add_device(self, device_id: str, properties: Mapping[str, object]) -> None:
        """Take in a device's profile, or raise `InvalidProfile`; see `Fleet.add`."""
        self._fleet.add(device_id, properties)

    def draw_evaluators(
        self, server_round: int, device_ids: Iterable[str], count: int
    ) -> list[str]:
        """Draw devices to evaluate the model: a function of seed, round and names."""
        return self._fleet.draw_evaluators(server_round, device_ids, count)

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
        return self._planner.plan(
            server_round,
            device_ids,
            fleet=self._fleet,
            model=self._model,
            chooser=self._chooser,
            partial=self.server_round > 0,
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
        """
        sent = self._model.arrays()
        checked = read_replies(
            self._reader, plan, replies, sent, self._norms, self._limits
        )
        # In the plan's order, so that the sum does not depend on who came first.
        updates = [
            (plan.assignments[device].block_index, checked.accepted[device].update)
            for device in plan.device_ids
            if device in checked.accepted
        ]
        if updates:
            state = self._model.state()
            stepped = {name for _, update in updates for name in update.gradients}
            self._chooser.before_step({name: state[name] for name in stepped})
            self._model.step(plan.server_round, [update for _, update in updates])
            blocks = [block for block, _ in updates]
            self._chooser.after_step(plan.server_round, blocks, state)
        record = round_record(
            plan,
            checked,
            self._statement,
            sent_nbytes=self._model.nbytes(),
            wireless_s=self._wireless_s,
        )
        self._fleet.learn(plan, checked)
        self._norms = checked.norms
        self._wireless_s = record.wireless_s
        self.server_round = plan.server_round
        return record

    def skip_round(self, server_round: int, reason: str) -> RoundRecord:
        """Return the record of a round that nobody was asked to take part in."""
        self.server_round = server_round
        return RoundRecord(
            server_round=server_round,
            num_devices=len(self._fleet.profiles),
            wireless_s=self._wireless_s,
            skipped=reason,
        )

    # --- the model -------------------------------------------------------------------

    def state(self) -> dict[str, npt.NDArray[np.float32]]:
        """Return the trainable parameters' current values, as views."""
        return self._model.state()

    @property
    def sends_by_name(self) -> bool:
        """Whether devices are sent the whole model by name, and return weights."""
        return self._model.is_sent_whole

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return what devices are sent, by name in the order of sending."""
        return self._model.arrays()

    def constants(self) -> dict[str, npt.NDArray[Any]]:
        """Return those of the arrays that never change, by name."""
        return self._model.constants()

    def start_from(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Take in the values to start from, or raise `UserError` if they do not fit."""
        self._model.start_from(arrays)
        self._chooser.start_from(self._model.state())

    def adopt(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Take in values that something around the strategy has changed."""
        self._model.adopt(arrays)

    # --- checkpoints -----------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """Return all that the rounds to come depend on, to be saved between rounds."""
        state = RunState(
            server_round=self.server_round,
            wireless_s=self._wireless_s,
            profiles=self._fleet.profiles,
            estimate=self._fleet.estimate,
            rates=self._fleet.rates,
            meetings=self._fleet.meetings,
            history=self._chooser.history,
            absences=self._fleet.absences,
            norms=self._norms,
        )
        model = self._model.snapshot()
        return Snapshot(
            {**model.arrays, **self._chooser.snapshot()},
            {**model.values, "state": state.to_values()},
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot, in a coordinator made with the same arguments."""
        self._model.restore(snapshot)
        state = RunState.from_values(snapshot.values["state"])
        self._fleet.restore(state)
        self._chooser.restore(state.history, snapshot.arrays)
        self._norms = state.norms
        self._wireless_s = state.wireless_s
        self.server_round = state.server_round
