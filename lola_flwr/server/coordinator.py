"""One round of LoLa-DEFT on the server: plan it, take its replies in, step the model.

The coordinator knows neither of Flower's two strategy interfaces; each is a thin
adapter that carries its plans out and hands it the replies as bytes and records.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from lola_flwr.costs.estimated import BlockCosts
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.randomness import rng_for
from lola_flwr.run.checkpoint import Snapshot
from lola_flwr.run.records import RoundRecord
from lola_flwr.server.assembly import BlockUpdate
from lola_flwr.server.model import ServedModel
from lola_flwr.server.reference import Reference
from lola_flwr.server.replies import DeviceReply, UpdateReader
from lola_flwr.server.round.intake import read_replies
from lola_flwr.server.round.learning import learned
from lola_flwr.server.round.plan import RoundPlan
from lola_flwr.server.round.planner import RoundPlanner
from lola_flwr.server.round.record import round_record
from lola_flwr.server.selection.choice import relative_moves
from lola_flwr.server.selection.history import BlockHistory
from lola_flwr.server.selection.importance import measure_importance
from lola_flwr.server.settings import RoundSettings
from lola_flwr.server.state import RunState
from lola_flwr.wire.components import checked_rank
from lola_flwr.wire.npy import WireArray
from lola_flwr.wire.payload import SizesDown, UpdateSizes
from lola_flwr.wire.versions import Manifest


class Coordinator:
    """The server's side of LoLa-DEFT, apart from any transport.

    What it knows is one frozen value, ``state``; apart from it are the model's values
    and the optimizer's.

    Parameters
    ----------
    model
        The model that is trained.
    costs
        What each of its blocks costs a device.
    batch_size
        Examples of a device's mini-batch; no reply can weigh more. (A device that
        returns weights may have trained on any number.)
    settings
        How the rounds go.

    Raises
    ------
    UserError
        The settings name blocks, a codec, a policy or a rank that there is not, or what
        is for gradients where devices return weights.
    """

    def __init__(
        self,
        model: ServedModel,
        costs: BlockCosts,
        *,
        batch_size: int = 32,
        settings: RoundSettings | None = None,
    ) -> None:
        settings = RoundSettings() if settings is None else settings
        if model.is_sent_whole:
            settings.check_for_weights()
        partition = model.partition
        settings.allocation.mode.check(partition.num_blocks)
        self.state = RunState(history=BlockHistory.of(partition.num_blocks))
        self._model = model
        self._settings = settings
        if settings.selection.response is not None:
            model.remember_start()
        sizes = _update_sizes(model, settings)
        rank = settings.transfer.rank
        self._planner = RoundPlanner(
            partition=partition,
            costs=costs,
            sizes=sizes,
            full_rank=rank and checked_rank(partition, sizes.shapes, rank),
            settings=settings,
            batch_size=batch_size,
            base_fingerprint=model.base_fingerprint,
            is_sent_whole=model.is_sent_whole,
            sizes_down=SizesDown.of(
                model.arrays(),
                settings.transfer.downlink_codec,
                by_name=model.is_sent_whole,
            ),
            exchange=model.exchange,
        )
        is_tracked = settings.transfer.downlink == "changed"
        self._versions = model.versions() if is_tracked else None
        self._reference: Reference | None = None
        if settings.transfer.downlink_codec != "fp32":
            codec = settings.transfer.downlink_codec
            self._reference = Reference(codec, model.versions())
        self._reader = UpdateReader(
            partition,
            tuple(model.nbytes()),
            settings.limits.max_norm,
            settings.example_weight,
            takes_weights=model.is_sent_whole,
        )
        self._judges = settings.devices.reputation and not model.is_sent_whole

    @property
    def partition(self) -> BlockPartition:
        """Blocks of the model."""
        return self._model.partition

    @property
    def server_round(self) -> int:
        """Last complete round; 0 before the first."""
        return self.state.server_round

    # --- devices ---------------------------------------------------------------------

    def meet_devices(self, server_round: int, device_ids: Iterable[str]) -> list[str]:
        """Take note of who is there; return those to ask for their profiles."""
        there = list(device_ids)
        fleet, held = self.state.fleet.met(there), self.state.held.of_these(there)
        self.state = replace(self.state, fleet=fleet, held=held)
        return fleet.to_ask(server_round, there)

    def add_device(self, device_id: str, properties: Mapping[str, object]) -> None:
        """Take in a device's profile, or raise `InvalidProfile`."""
        assumed = self._settings.devices.assumed_profile
        fleet = self.state.fleet.with_device(device_id, properties, assumed)
        self._settings.check_profile(fleet.profiles[device_id])
        self.state = replace(self.state, fleet=fleet)

    def note_answers(
        self, server_round: int, asked: Iterable[str], answered: Collection[str]
    ) -> None:
        """Take note of which devices, of those asked for their profiles, answered."""
        fleet = self.state.fleet.answered(server_round, asked, answered)
        self.state = replace(self.state, fleet=fleet)

    def draw_evaluators(
        self, server_round: int, device_ids: Iterable[str], count: int
    ) -> list[str]:
        """Draw devices to evaluate the model: a function of seed, round and names."""
        seed, fleet = self._settings.seed, self.state.fleet
        return fleet.draw(seed, "evaluation", server_round, device_ids, count)

    def draw_trainers(
        self, server_round: int, device_ids: Iterable[str], count: int
    ) -> list[str]:
        """Draw devices that a round may ask: a function of seed, round and names."""
        seed, fleet = self._settings.seed, self.state.fleet
        return fleet.draw(seed, "training", server_round, device_ids, count)

    def evaluation_manifests(self, device_ids: Iterable[str]) -> dict[str, Manifest]:
        """Return what to send of the present model to those that keep copies."""
        held = self.state.held
        keeping = [device for device in device_ids if device in held.of_device]
        if self._versions is None or not keeping:
            return {}
        version = self._versions.of([*self._model.arrays().values()])
        return {device: held.manifest(device, version) for device in keeping}

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
        if self._settings.selection.measures_in(server_round):
            self.state = self._with_importance(server_round)
        version, arrays = None, self._model.arrays()
        if self._reference is not None:
            version = self._reference.advance(arrays)
        elif self._versions is not None:
            version = self._versions.of([*arrays.values()])
        return self._planner.plan(self.state, server_round, device_ids, version)

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
        checked = read_replies(
            self._reader,
            plan,
            replies,
            self._model.arrays(),
            self.state.norms,
            self._settings.limits,
            self.state.reputation if self._judges else None,
            self._settings.devices.own_examples,
        )
        # In the plan's order, so that the sum does not depend on who came first.
        updates = [
            (plan.assignments[device].blocks, checked.accepted[device].update)
            for device in plan.device_ids
            if device in checked.accepted
        ]
        moves: dict[int, float] = {}
        if updates:
            # A rate is for the batch that is given.
            chosen = bool(self._settings.allocation.batch_sizes)
            factor = self.state.noise.step_factor()
            lengths = plan.step_lengths(checked.accepted, factor) if chosen else {}
            moves = self._stepped(plan.server_round, updates, lengths)
        record = round_record(
            plan,
            checked,
            self._planner.statement,
            sizes_down=self._planner.sizes_down,
            wireless_s=self.state.wireless_s,
            joules=self.state.joules,
        )
        self.state = learned(
            self.state,
            plan,
            checked,
            record,
            partition=self._planner.partition,
            relative_moves=moves,
            correct_profiles=self._settings.devices.correct_profiles,
        )
        return record

    def skip_round(self, server_round: int, reason: str) -> RoundRecord:
        """Return the record of a round that nobody was asked to take part in."""
        self.state = replace(self.state, server_round=server_round)
        return RoundRecord(
            server_round=server_round,
            num_devices=len(self.state.fleet.profiles),
            wireless_s=self.state.wireless_s,
            joules=self.state.joules,
            skipped=reason,
        )

    def _stepped(
        self,
        server_round: int,
        updates: Collection[tuple[Sequence[int], BlockUpdate]],
        lengths: Mapping[int, float],
    ) -> dict[int, float]:
        """Step the model; return how far each block that was stepped has moved."""
        values = self._model.state()
        before: dict[str, npt.NDArray[np.float32]] = {}
        if not self._settings.selection.takes_all:
            names = {name for _, update in updates for name in update.gradients}
            before = {name: values[name].copy() for name in names}
        zeroth_order = self._settings.devices.zeroth_order
        self._model.step(
            server_round,
            [update for _, update in updates],
            zeroth_order_lr=0.0 if zeroth_order is None else zeroth_order.lr,
            lengths=lengths,
        )
        blocks = [block for trained, _ in updates for block in trained]
        return relative_moves(self.partition, blocks, before, values)

    def _with_importance(self, server_round: int) -> RunState:
        """Return the state with what trials teach about the blocks' importance."""
        selection = self._settings.selection
        assert selection.response is not None
        history = measure_importance(
            self.state.history,
            self.partition,
            start=self._model.start,
            values=self._model.state(),
            response=selection.response,
            trials=selection.trials,
            rng=rng_for(self._settings.seed, "trials", server_round),
        )
        return replace(self.state, history=history)

    # --- the model -------------------------------------------------------------------

    def values(self) -> dict[str, npt.NDArray[np.float32]]:
        """Return the trainable parameters' current values, as views."""
        return self._model.state()

    def packed(self, names: Sequence[str], codec: str = "") -> WireArray:
        """Return what devices are sent of some parameters, perhaps as a view.

        Parameters
        ----------
        names
            The parameters.
        codec
            What they travel in; "": they are sent as they are.
        """
        if self._reference is not None:
            return self._reference.packed(names, codec or "fp32")
        return self._model.packed(names)

    def packed_moves(self, names: Sequence[str]) -> WireArray:
        """Return by how much some parameters have changed, encoded, in one array."""
        assert self._reference is not None
        return self._reference.packed_moves(names)

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
        if self._reference is not None:
            self._reference.forget()

    def adopt(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Take in values that something around the strategy has changed."""
        self._model.adopt(arrays)

    # --- checkpoints -----------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """Return all that the rounds to come depend on, to be saved between rounds."""
        model = self._model.snapshot()
        values = {**model.values, "state": self.state.to_values()}
        if self._reference is None:
            return Snapshot(model.arrays, values)
        sent = self._reference.snapshot()
        return Snapshot({**model.arrays, **sent.arrays}, {**values, **sent.values})

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot, in a coordinator made with the same arguments.

        Raises
        ------
        UserError
            The snapshot is of another model, or of another version's state.
        """
        state = RunState.from_values(snapshot.values["state"])
        self._model.restore(snapshot)
        if self._reference is not None:
            self._reference.restore(snapshot)
        self.state = state


def _update_sizes(model: ServedModel, settings: RoundSettings) -> UpdateSizes:
    """Return how large updates are, by what the devices' gradients become."""
    low_rank, rank = settings.transfer.low_rank, settings.transfer.rank
    shapes = {
        name: v.shape if low_rank is None else low_rank.shape(v.shape)
        for name, v in model.state().items()
    }
    return UpdateSizes(
        model.partition,
        shapes,
        settings.transfer.codec,
        settings.transfer.head,
        by_name=model.is_sent_whole,
        statistics_bytes=model.statistics_bytes(),
        rank=rank if isinstance(rank, int) else None,
    )
