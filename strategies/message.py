"""LoLa-DEFT as a ``flwr.serverapp.strategy.Strategy`` (Message API)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from logging import INFO, WARNING

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
from flwr.serverapp.strategy import Result, Strategy
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords

from lola_flwr.server.coordinator import Coordinator
from lola_flwr.server.replies import DeviceReply
from lola_flwr.strategies.arrival_grid import upload_seconds
from lola_flwr.strategies.deadline_grid import DeadlineGrid
from lola_flwr.strategies.presence import ask_profiles, without_errors
from lola_flwr.strategies.rounds import (
    BlockRounds,
    OnRound,
    Waits,
    evaluation_weights,
)
from lola_flwr.strategies.wrappers import refuse_clipping_on_server
from lola_flwr.wire.records import REPORT_KEY

MetricsAggregation = Callable[[list[RecordDict], str], MetricRecord]


class LoLaDeft(Strategy):
    """Each active device trains one block; the server assembles and steps.

    Names of arguments are those of ``flwr.serverapp.strategy.FedAvg``; its
    ``fraction_train`` and ``min_train_nodes`` have no counterpart, since the
    coordinator plans who trains.

    Parameters
    ----------
    coordinator
        Plans rounds and holds the model's trainable values.
    min_available_nodes
        Devices that must be connected before the first round is planned (default: as
        many as the model has blocks). Later rounds go on with those that are there.
    waits
        How long to wait for devices, their profiles, and a round's replies.
    on_round
        Called with each round's record, after its evaluation.
    fraction_evaluate
        Share of the devices that evaluate the model on their own data (default: none,
        since every message costs a device seconds).
    min_evaluate_nodes
        At least so many do, unless ``fraction_evaluate`` is 0.
    weighted_by_key
        Metric of a reply that counts its examples.
    arrayrecord_key, configrecord_key
        Keys of the arrays and of the configuration in the messages to devices.
    evaluate_metrics_aggr_fn
        Aggregates the devices' evaluations (default: mean weighted by examples).

    References
    ----------
    .. [1] Wu, Chen, Huang, "Resource Management for Low-latency Cooperative
       Fine-tuning of Foundation Models at the Network Edge", arXiv:2407.09873.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        *,
        min_available_nodes: int | None = None,
        waits: Waits | None = None,
        on_round: OnRound | None = None,
        fraction_evaluate: float = 0.0,
        min_evaluate_nodes: int = 2,
        weighted_by_key: str = "num-examples",
        arrayrecord_key: str = "arrays",
        configrecord_key: str = "config",
        evaluate_metrics_aggr_fn: MetricsAggregation | None = None,
    ) -> None:
        self.coordinator = coordinator
        self.fraction_evaluate = fraction_evaluate
        self.min_evaluate_nodes = min_evaluate_nodes
        self.weighted_by_key = weighted_by_key
        self.arrayrecord_key = arrayrecord_key
        self.configrecord_key = configrecord_key
        self.evaluate_metrics_aggr_fn = (
            evaluate_metrics_aggr_fn or aggregate_metricrecords
        )
        self._waits = waits or Waits()
        self._rounds = BlockRounds(
            coordinator,
            min_available=min_available_nodes,
            waits=self._waits,
            on_round=on_round,
        )
        # Frozen arrays are encoded once.
        self._frozen = {
            name: Array(values) for name, values in coordinator.constants().items()
        }
        self._returned: ArrayRecord | None = None
        self._sent = ArrayRecord()
        self._start_reports = False
        # Under a wrapper, whose start sends through Flower's own Grid, there is none.
        self._arrivals: DeadlineGrid | None = None

    def initial_arrays(self) -> ArrayRecord:
        """Return the coordinator's arrays, to be handed to ``start``."""
        return ArrayRecord(
            {
                name: self._frozen.get(name) or Array(values)
                for name, values in self.coordinator.arrays().items()
            }
        )

    def summary(self) -> None:
        """Log what will be done."""
        partition = self.coordinator.partition
        log(INFO, "\t├──> %d blocks, trained by as many devices", partition.num_blocks)
        log(INFO, "\t├──> Nodes to wait for: %d", self._rounds.min_available)
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
        server_round += self._rounds.rounds_before
        arrays = self._take_in(arrays)
        plan = self._rounds.plan(
            server_round,
            connected=lambda: [str(node) for node in grid.get_node_ids()],
            ask_profiles=lambda devices: ask_profiles(
                grid, devices, server_round, self._waits.profiles_s
            ),
        )
        if plan is None:
            return []
        return [
            self._message(
                MessageType.TRAIN,
                device,
                server_round,
                ArrayRecord(sent),
                ConfigRecord({**config, **plan.assignments[device].to_record()}),
            )
            for device, sent in self._rounds.contents(plan, arrays, Array)
        ]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Assemble the block updates and take one server step."""
        server_round += self._rounds.rounds_before
        metrics = self._rounds.complete(
            DeviceReply(
                device_id=str(reply.metadata.src_node_id),
                tensors=only_arrays(reply.content),
                num_examples=_only_metrics(reply.content).get(self.weighted_by_key),
                report=reply.content.config_records.get(REPORT_KEY, {}),
                upload_s=upload_seconds(
                    self._arrivals, str(reply.metadata.src_node_id)
                ),
            )
            for reply in without_errors(replies, server_round)
        )
        if metrics is None:
            return None, None
        self._returned = self._sent = self.initial_arrays()
        return self._sent, MetricRecord({**metrics})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Have devices evaluate, drawn from the run's seed."""
        # A wrapper may have changed all arrays, by adding noise: what never changes is
        # put back, in the record that the run ends with.
        for name, array in self._frozen.items():
            if arrays[name] is not array:
                arrays[name] = array
        if self.fraction_evaluate == 0.0:
            return []
        server_round += self._rounds.rounds_before
        devices = [str(node) for node in grid.get_node_ids()]
        count = max(int(len(devices) * self.fraction_evaluate), self.min_evaluate_nodes)
        return [
            self._message(
                MessageType.EVALUATE,
                device,
                server_round,
                arrays,
                ConfigRecord({**config, "server-round": server_round}),
            )
            for device in self.coordinator.draw_evaluators(server_round, devices, count)
        ]

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Aggregate the evaluations that can be; others are left out."""
        server_round += self._rounds.rounds_before
        contents = [r.content for r in without_errors(replies, server_round)]
        usable = _alike([c for c in contents if self._is_evaluation(c)])
        claims = [float(_only_metrics(c)[self.weighted_by_key]) for c in usable]  # type: ignore[arg-type]
        for content, weight in zip(usable, evaluation_weights(claims), strict=True):
            _only_metrics(content)[self.weighted_by_key] = weight
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
            values = {name: array.numpy() for name, array in arrays.items()}
            if self._returned is None:
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

    def _is_evaluation(self, content: RecordDict) -> bool:
        metrics = _only_metrics(content)
        examples = metrics.get(self.weighted_by_key)
        return (
            isinstance(examples, (int, float))
            and examples > 0
            and all(
                math.isfinite(number)
                for value in metrics.values()
                for number in (value if isinstance(value, list) else [value])
            )
        )


def only_arrays(content: RecordDict) -> dict[str, bytes]:
    """Return a reply's arrays as bytes; none unless there is just one ArrayRecord."""
    records = list(content.array_records.values())
    if len(records) != 1:
        return {}
    return {name: array.data for name, array in records[0].items()}


def _only_metrics(content: RecordDict) -> MetricRecord:
    """Return a reply's metrics; none unless there is just one MetricRecord."""
    records = list(content.metric_records.values())
    return records[0] if len(records) == 1 else MetricRecord()


def _alike(contents: list[RecordDict]) -> list[RecordDict]:
    """Return the largest group whose metrics have the same names and lengths."""

    def form(content: RecordDict) -> tuple[tuple[str, int], ...]:
        metrics = _only_metrics(content)
        return tuple(
            sorted(
                (name, len(value) if isinstance(value, list) else -1)
                for name, value in metrics.items()
            )
        )

    forms = [form(content) for content in contents]
    largest = Counter(forms).most_common(1)
    return [c for c, f in zip(contents, forms, strict=True) if f == largest[0][0]]
