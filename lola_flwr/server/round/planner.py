"""Plan one round: from what the server knows to what each device is told."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lola_flwr.allocation import InfeasibleAllocation
from lola_flwr.arrays import Float64Array
from lola_flwr.costs.estimated import BlockCosts
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.model.exchange import Exchange
from lola_flwr.planning import Known, RunStatement, SolvedRound, solve_round
from lola_flwr.randomness import rng_for
from lola_flwr.server.round.plan import RoundPlan
from lola_flwr.server.settings import RoundSettings
from lola_flwr.server.state import RunState
from lola_flwr.wire.codec import AUTO
from lola_flwr.wire.components import Drawn, rank_ladder
from lola_flwr.wire.payload import SizesDown, UpdateSizes
from lola_flwr.wire.records import Assignment
from lola_flwr.wire.versions import Manifest, ModelVersion


@dataclass(frozen=True, kw_only=True, eq=False)
class RoundPlanner:
    """How a run's rounds are planned.

    Parameters
    ----------
    partition
        Blocks of the model.
    costs
        What each block costs a device.
    sizes
        How large updates are.
    settings
        How the rounds go.
    batch_size
        Examples of a device's mini-batch, where rounds do not choose them.
    base_fingerprint
        Digest of the frozen weights, which every device must hold.
    is_sent_whole
        Whether devices are sent the whole model by name, and return weights.
    sizes_down
        How large what devices are sent is.
    exchange
        What devices call these arrays, and what they keep to themselves; None: they
        call them as the server does, and keep nothing.
    full_rank
        How many components the blocks' adapters have, where devices may send some.
    """

    partition: BlockPartition
    costs: BlockCosts
    sizes: UpdateSizes
    settings: RoundSettings
    batch_size: int
    base_fingerprint: str
    is_sent_whole: bool
    sizes_down: SizesDown
    exchange: Exchange | None = None
    full_rank: int | None = None

    def __post_init__(self) -> None:
        """Check now what would else be an error in round 1."""
        self.statement  # noqa: B018

    @property
    def statement(self) -> RunStatement:
        """What the problems of the rounds have in common."""
        settings = self.settings
        return RunStatement(
            costs=self.costs,
            train_all=bool(settings.devices.train_all),
            sizes=self.sizes,
            channel=settings.channel,
            allocation=settings.allocation,
            zeroth_order=settings.devices.zeroth_order,
            reduced_schedules=settings.devices.reduced_schedules,
            latency_target_s=settings.selection.latency_target_s,
            seed=settings.seed,
            ranks=self._ranks,
            batch_size=self.batch_size,
        )

    @property
    def _ranks(self) -> tuple[int, ...]:
        """Ranks that rounds choose from; none where they have one that is given."""
        if self.full_rank is None or self.settings.transfer.rank != AUTO:
            return ()
        return rank_ladder(self.full_rank)

    def plan(
        self,
        state: RunState,
        server_round: int,
        device_ids: Iterable[str],
        version: ModelVersion | None = None,
    ) -> RoundPlan:
        """Draw the channel, and give out blocks and bandwidth.

        Parameters
        ----------
        state
            What is known before the round.
        server_round
            Round, from 1.
        device_ids
            Devices that are there; those without a known profile are left out.
        version
            Of the model that devices are to hold, where they are sent what they lack;
            None: they are sent all of it.

        Raises
        ------
        InfeasibleAllocation
            The devices cannot compute all blocks, or none has a usable profile.
        """
        ids = state.fleet.known(device_ids)
        if not ids:
            raise InfeasibleAllocation(
                "No device has reported a usable profile; see the warnings above."
            )
        counted_on = state.counted_on(server_round, ids)
        try:
            solved = self._solved(state, server_round, counted_on, version)
        except InfeasibleAllocation:
            if counted_on == ids:
                raise
            solved = self._solved(state, server_round, ids, version)
        else:
            ids = counted_on
        left = tuple(ids[row] for row in solved.stated.rows)
        manifests = {
            left[row]: state.held.manifest(left[row], version)
            for row, _ in solved.active()
            if version is not None
        }
        drawn = self._drawn(state, solved, left)
        return RoundPlan(
            device_ids=left,
            solved=solved,
            assignments=self._assignments(state, solved, left, manifests, drawn),
            manifests=manifests,
            drawn=drawn,
            overheard={
                left[row]: state.held.manifest(left[row], version)
                for row in solved.overhearing()
                if version is not None and left[row] in state.held.of_device
            },
        )

    def _solved(
        self,
        state: RunState,
        server_round: int,
        ids: Sequence[str],
        version: ModelVersion | None,
    ) -> SolvedRound:
        known = self._known(state, server_round, ids, version)
        return solve_round(self.statement, known)

    def _download_bits(
        self, state: RunState, ids: Sequence[str], version: ModelVersion | None
    ) -> Float64Array | None:
        """Return what devices are to be sent, [K]; None where that takes no time."""
        if self.settings.channel.downlink_channel.mode == "free":
            return None

        if version is None:
            return np.full(len(ids), 8.0 * self.sizes_down.message_bytes(None))
        manifests = (state.held.manifest(device, version) for device in ids)
        return np.array([8.0 * self.sizes_down.message_bytes(m) for m in manifests])

    def _known(
        self,
        state: RunState,
        server_round: int,
        ids: Sequence[str],
        version: ModelVersion | None,
    ) -> Known:
        """Return what is known of some devices, in this order, and of all blocks."""
        profiles = [state.fleet.profiles[device] for device in ids]
        names = [profile.name for profile in profiles]
        absences, settings = state.fleet.absences, self.settings
        noise_scale = state.noise.scales(self.partition.num_blocks)
        return Known(
            server_round=server_round,
            profiles=tuple(profiles),
            estimate=state.estimate,
            rates=state.rates,
            downlinks=state.downlinks,
            memory_limit_bytes=np.array(
                [absences.memory_limit(server_round, name) for name in names]
            ),
            failures=tuple(absences.failures(name) for name in names),
            meetings=np.array([state.meetings_of(name) for name in names], np.int64),
            given=state.influence.given(names, state.history.num_blocks),
            wanted=settings.selection.wanted(
                settings.allocation.mode,
                state.history,
                server_round,
                num_devices=len(ids),
                seed=settings.seed,
            ),
            worth=settings.selection.worth(state.history, server_round),
            block_updates=state.block_updates(),
            partial=settings.allocation.partial or state.server_round > 0,
            time_s=state.wireless_s,
            downlink_bits=self._download_bits(state, ids, version),
            noise_scale=noise_scale,
            rounds_since=state.history.staleness(server_round),
            pace=state.pace.a_second(noise_scale),
            usual_round_s=state.pace.usual_round_s,
            component_squares=self._component_squares(state),
        )

    def _component_squares(self, state: RunState) -> Float64Array | None:
        if self.full_rank is None:
            return None
        return state.components.of_blocks(self.partition.num_blocks, self.full_rank)

    def _drawn(
        self, state: RunState, solved: SolvedRound, device_ids: Sequence[str]
    ) -> dict[str, Drawn]:
        """Draw which components devices send that do not send all."""
        squares = self._component_squares(state)
        if squares is None or solved.rank is None:
            return {}
        drawn = {}
        for row, block in solved.active():
            rank, name = int(solved.rank[row]), solved.stated.profiles[row].name
            if rank < squares.shape[1]:
                blocks = solved.stated.blocks(block)
                rng = rng_for(
                    self.settings.seed, "components", solved.server_round, name
                )
                drawn[device_ids[row]] = Drawn.of(
                    {one: squares[one] for one in blocks},
                    rank,
                    {one: rng.random() for one in blocks},
                )
        return drawn

    def _assignments(
        self,
        state: RunState,
        solved: SolvedRound,
        device_ids: Sequence[str],
        manifests: dict[str, Manifest],
        drawn: dict[str, Drawn],
    ) -> dict[str, Assignment]:
        """Return what each active device is told."""
        stated, payloads = solved.stated, solved.stated.payloads
        upload_s = solved.allocation.upload_s(solved.problem)
        low_rank = self.settings.transfer.low_rank
        zeroth_order = self.settings.devices.zeroth_order
        assignments = {}
        for row, block in solved.active():
            device, profile = device_ids[row], stated.profiles[row]
            blocks = stated.blocks(block)
            manifest = manifests.get(device)
            sends_head = bool(payloads.sends_head[block])
            fields: dict[str, Any] = {}
            if self.is_sent_whole:
                names = self.partition.update_names(*blocks, head=sends_head)
                fields["update_names"] = "\n".join(names)
                fields["frozen_names"] = "\n".join(self.partition.frozen)
                fields |= {} if self.exchange is None else self.exchange.fields(names)
            if profile.uplink_bps is not None:
                # Only a link whose rate is known can be held to a part of it.
                payload_bits = (
                    solved.problem.full_band_upload_s[row, block] * stated.rate_bps[row]
                )
                fields["uplink_bps"] = float(payload_bits / upload_s[row])
            if zeroth_order is not None and stated.without_backward[row]:
                fields |= zeroth_order.directions_for(
                    self.settings.seed, solved.server_round, profile.name
                )
            if device in drawn:
                fields["components"] = drawn[device].to_text()
            if low_rank is not None:
                fields |= low_rank.assignment_fields()
            batch_size = self.batch_size
            if solved.batch_size is not None:
                batch_size = int(solved.batch_size[row])
                due = state.noise.is_due(blocks, solved.server_round)
                fields["measures_noise"] = due or None
            assignments[device] = Assignment(
                server_round=solved.server_round,
                block_index=block,
                share=float(solved.allocation.share[row]),
                batch_size=batch_size,
                codec=payloads.codecs[solved.codec_level[row]],
                base_fingerprint=self.base_fingerprint,
                sends_head=sends_head,
                manifest=None if manifest is None else manifest.to_text(),
                memory_bytes=float(stated.required_bytes[row, block]),
                operations=stated.operations(row, block),
                further_blocks=" ".join(map(str, blocks[1:])) or None,
                trains_all=bool(stated.trains_all[row]),
                **fields,
            )
        return assignments
