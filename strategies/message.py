"""LoLa-DEFT as a ``flwr.serverapp.strategy.Strategy`` (Message API)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from logging import INFO, WARNING
from typing import Any

import numpy.typing as npt
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result

from lola_flwr.device.own_training import Model
from lola_flwr.server.coordinator import Coordinator
from lola_flwr.server.replies import DeviceReply
from lola_flwr.strategies.arrival_grid import seconds_of
from lola_flwr.strategies.block_rounds import BlockRounds
from lola_flwr.strategies.deadline_grid import DeadlineGrid
from lola_flwr.strategies.metrics import only_arrays, only_metrics, usable_contents
from lola_flwr.strategies.presence import ask_profiles, without_errors
from lola_flwr.strategies.rounds import OnRound, Waits
from lola_flwr.strategies.served import Served, arguments_of, divided
from lola_flwr.strategies.wrappers import refuse_clipping_on_server
from lola_flwr.wire.records import REPORT_KEY


class LoLaDeft(FedAvg):
    """Each active device trains one block; the server assembles and steps.

    In a project it takes the place of ``flwr.serverapp.strategy.FedAvg``, with the
    model before FedAvg's arguments: ``LoLaDeft(model, fraction_train=0.5)``. What is
    exchanged, and by which names, the arrays say that ``start`` is given.

    Parameters
    ----------
    coordinator
        Plans rounds and holds the model's trainable values; or the model itself, of
        which ``coordinator_for_weights`` makes it.
    *args, **options
        FedAvg's arguments, with FedAvg's meaning; and of a model the arguments of
        ``coordinator_for_weights``. ``fraction_train`` and ``min_train_nodes`` say how
        many devices are drawn that a round may ask; the allocation says what of. Of a
        coordinator no device evaluates unless ``fraction_evaluate`` says so, and the
        first round waits for as many devices as the model has blocks, or for fewer if
        no more come, unless ``min_available_nodes`` says how many.
    waits
        How long to wait for devices, their profiles, and a round's replies.
    on_round
        Called with each round's record, after its evaluation.

    References
    ----------
    .. [1] Wu, Chen, Huang, "Resource Management for Low-latency Cooperative
       Fine-tuning of Foundation Models at the Network Edge", arXiv:2407.09873.
    """

    def __init__(
        self,
        coordinator: Coordinator | Model,
        *args: Any,
        waits: Waits | None = None,
        on_round: OnRound | None = None,
        **options: Any,
    ) -> None:
        ours, theirs = divided(options)
        given = arguments_of(FedAvg, args, theirs)
        super().__init__(**given)
        is_project = not isinstance(coordinator, Coordinator)
        least: int | None = None
        if is_project:
            # As FedAvg waits: for those whom it draws at least.
            least = max(self.min_available_nodes, self.min_train_nodes)
        elif "min_available_nodes" in given:
            least = self.min_available_nodes
        self._served: Served[Array] = Served(
            coordinator,
            ours,
            encode=Array,
            min_available=least,
            waits=waits,
            on_round=on_round,
        )
        if not is_project:
            self.fraction_evaluate = given.get("fraction_evaluate", 0.0)
        self._returned: ArrayRecord | None = None
        self._sent = ArrayRecord()
        self._start_reports = False
        # Under a wrapper, whose start sends through Flower's own Grid, there is none.
        self._arrivals: DeadlineGrid | None = None

    @property
    def coordinator(self) -> Coordinator:
        """Plans rounds and holds the model's trainable values."""
        return self._served.coordinator

    @property
    def _rounds(self) -> BlockRounds:
        return self._served.rounds

    def initial_arrays(self) -> ArrayRecord:
        """Return the coordinator's arrays, to be handed to ``start``."""
        return ArrayRecord(self._served.encoded())

    def summary(self) -> None:
        """Log what will be done."""
        if self._served.is_made:
            blocks = self.coordinator.partition.num_blocks
            log(INFO, "\t├──> %d blocks, one or more a device", blocks)
            log(INFO, "\t├──> Nodes to wait for: %d", self._rounds.min_available)
        log(INFO, "\t├──> Nodes drawn to train: fraction %.2f", self.fraction_train)
        log(INFO, "\t└──> Nodes that evaluate: fraction %.2f", self.fraction_evaluate)

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run Flower's rounds; what ``evaluate_fn`` returns is part of the records.

        A strategy can be started again: it goes on from ``initial_arrays``, with the
        optimizer's moments and the wireless time that it has.

        Parameters
        ----------
        grid, timeout, train_config, evaluate_config, evaluate_fn
            As in ``flwr.serverapp.strategy.Strategy``; ``timeout``, in seconds, bounds
            the wait for each round's replies from above.
        initial_arrays
            The coordinator's arrays, by name: the model's state dict, if it was made
            with one. A resumed run goes on from its own arrays.
        num_rounds
            The run's rounds, of which a resumed run has done some before.

        Raises
        ------
        UserError
            ``initial_arrays`` is of another model, or the first round cannot be
            planned.
        """
        self._returned = None
        self._served.prepare(_values(initial_arrays))
        self._rounds.restart()
        before = self._rounds.rounds_before

        def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
            server_round += before
            metrics = None if evaluate_fn is None else evaluate_fn(server_round, arrays)
            self._rounds.report(server_round, {} if metrics is None else dict(metrics))
            return metrics

        grid = self._arrivals = DeadlineGrid(grid, wait_s=self._rounds.wait_s)
        # Under a wrapper, which has a start of its own, evaluations stay unknown.
        self._start_reports = evaluate_fn is not None
        return super().start(
            grid,
            self.initial_arrays() if before else initial_arrays,
            num_rounds - before,
            timeout,
            train_config,
            evaluate_config,
            evaluate if self._start_reports else None,
        )

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask new devices for their profiles, allocate, and instruct active devices.

        Raises
        ------
        UserError
            In the first round: too few devices connected, the devices cannot compute
            all blocks, or ``arrays`` is of another model. Later rounds without any
            device are skipped. In any: a wrapper clips on the server.
        """
        refuse_clipping_on_server()
        arrays = self._take_in(arrays)
        server_round += self._rounds.rounds_before
        if self.fraction_train == 0.0:
            return []

        def connected() -> list[str]:
            return [str(node) for node in grid.get_node_ids()]

        def drawn(devices: Collection[str]) -> int:
            wanted = max(int(len(devices) * self.fraction_train), self.min_train_nodes)
            return min(wanted, len(devices))

        plan = self._rounds.plan(
            server_round,
            connected=connected,
            ask_profiles=lambda devices: ask_profiles(
                grid, devices, server_round, self._served.waits.profiles_s
            ),
            draw=lambda devices: self.coordinator.draw_trainers(
                server_round, devices, drawn(devices)
            ),
        )
        if plan is None:
            return []
        return [
            self._message(
                MessageType.TRAIN,
                device,
                server_round,
                _sharing(sent, arrays),
                ConfigRecord(plan.assignments[device].beside(config)),
            )
            for device, sent in self._rounds.contents(plan, arrays, Array)
        ]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Assemble the block updates and take one server step.

        Returns
        -------
        The arrays, and the round's figures with the project's own metrics, of those
        devices whose updates could be used.
        """
        server_round += self._rounds.rounds_before
        good = without_errors(replies, server_round)
        figures = self._rounds.complete(
            DeviceReply(
                device_id=str(reply.metadata.src_node_id),
                tensors=only_arrays(reply.content),
                num_examples=only_metrics(reply.content).get(self.weighted_by_key),
                report=reply.content.config_records.get(REPORT_KEY, {}),
                **seconds_of(self._arrivals, str(reply.metadata.src_node_id)),
            )
            for reply in good
        )
        if figures is None:
            return None, None
        used = [
            reply.content
            for reply in good
            if str(reply.metadata.src_node_id) in self._rounds.accepted
        ]
        metrics = MetricRecord({**figures})
        if usable := usable_contents(used, self.weighted_by_key):
            own = self.train_metrics_aggr_fn(usable, self.weighted_by_key)
            metrics = MetricRecord({**figures, **own})
        self._returned = self._sent = self.initial_arrays()
        return self._sent, metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Have devices evaluate, drawn from the run's seed."""
        self._rounds.require_complete(self)
        # A wrapper may have changed all arrays, by adding noise: what never changes is
        # put back, in the record that the run ends with.
        for name, array in self._served.constants.items():
            if arrays[name] is not array:
                arrays[name] = array
        if self.fraction_evaluate == 0.0:
            return []
        server_round += self._rounds.rounds_before
        devices = [str(node) for node in grid.get_node_ids()]
        count = max(int(len(devices) * self.fraction_evaluate), self.min_evaluate_nodes)
        drawn = self.coordinator.draw_evaluators(server_round, devices, count)
        # Of arrays that a wrapper has changed a device holds nothing.
        contents = (
            self._rounds.evaluation_contents(drawn, arrays)
            if arrays is self._sent
            else ((device, {**arrays}, {}) for device in drawn)
        )
        return [
            self._message(
                MessageType.EVALUATE,
                device,
                server_round,
                _sharing(sent, arrays),
                ConfigRecord({**config, **words, "server-round": server_round}),
            )
            for device, sent, words in contents
        ]

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Aggregate the evaluations that can be; others are left out."""
        server_round += self._rounds.rounds_before
        contents = [r.content for r in without_errors(replies, server_round)]
        usable = usable_contents(contents, self.weighted_by_key)
        if len(usable) < len(contents):
            refused = len(contents) - len(usable)
            log(WARNING, "round %s: %s evaluations left out", server_round, refused)
        if not self._start_reports:
            self._rounds.report(server_round, {})
        if not usable:
            return None
        return self.evaluate_metrics_aggr_fn(usable, self.weighted_by_key)

    def _take_in(self, arrays: ArrayRecord) -> ArrayRecord:
        """Make the arrays of this round the coordinator's; return what to send."""
        if arrays is not self._returned:
            values = _values(arrays)
            if self._returned is None:
                self._served.prepare(values)
                if not self._rounds.rounds_before:
                    self.coordinator.start_from(values)
            else:
                # A wrapper has changed what was returned, for instance by adding noise.
                # Frozen arrays stay as devices know them.
                self.coordinator.adopt(values)
            self._returned, self._sent = arrays, self.initial_arrays()
        return self._sent

    def _message(
        self,
        message_type: str,
        device: str,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,
    ) -> Message:
        return Message(
            RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: config}),
            message_type=message_type,
            dst_node_id=int(device),
            group_id=str(server_round),
        )


def _sharing(sent: Mapping[str, Array], arrays: ArrayRecord) -> ArrayRecord:
    """Return a record of these arrays themselves; ``arrays``, if they are all of them.

    Flower's constructor copies them, and each copy would be hashed for itself: as many
    times as there are devices that are sent the same.
    """
    if sent.keys() == arrays.keys():
        return arrays
    record = ArrayRecord()
    for name, array in sent.items():
        record[name] = array
    return record


def _values(arrays: ArrayRecord) -> dict[str, npt.NDArray[Any]]:
    return {name: array.numpy() for name, array in arrays.items()}
