"""D2FT as a ``flwr.serverapp.strategy.Strategy`` (Message API)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from logging import INFO

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

from lola_flwr.server.spread.exchange import (
    Exchange,
    PartFailed,
    PartReply,
    PartRequest,
)
from lola_flwr.server.spread.plan import StepPlan
from lola_flwr.server.spread.trainer import SpreadTrainer
from lola_flwr.strategies.arrival_grid import ArrivalGrid
from lola_flwr.strategies.metrics import only_arrays
from lola_flwr.strategies.presence import ask_profiles, without_errors
from lola_flwr.strategies.rounds import OnRound, Rounds, Waits
from lola_flwr.strategies.wrappers import refuse_clipping
from lola_flwr.wire.records import PART_ACTION, REPORT_KEY


class D2FT(Strategy):
    """One model is spread over the devices, and runs under D2FT's schedule.

    One of Flower's rounds is one training step, and takes many exchanges of messages:
    two for each layer forward, two back, and two with the owners of the micro-batches.
    All of them are made while the round is configured. Devices are ``LoLaClient``s.

    Parameters
    ----------
    trainer
        Holds the model's trainable values and steps them.
    min_available_nodes
        Devices that must be connected before the first step. Later steps go on with
        those that are there.
    waits
        How long to wait for devices and their profiles. (Its deadline is that of a
        round's replies; here ``exchange_wait_s`` bounds each wait.)
    exchange_wait_s
        How long to wait for the replies of one exchange; a step in which one is missing
        is skipped.
    evaluate_every
        Steps after which ``evaluate_fn`` is called; it is after the last, too. For it
        devices return the values that they hold.
    on_round
        Called with each step's record, after its evaluation.

    References
    ----------
    .. [1] Ding, Zhang, Wang, Ateniese, Yuan, "D2FT: Distributed Dynamic Fine-Tuning for
       Pretrained Transformers", arXiv:2504.12471.
    """

    def __init__(
        self,
        trainer: SpreadTrainer,
        *,
        min_available_nodes: int = 2,
        waits: Waits | None = None,
        exchange_wait_s: float = 300.0,
        evaluate_every: int = 1,
        on_round: OnRound | None = None,
    ) -> None:
        self.trainer = trainer
        self._waits = waits or Waits()
        self._rounds: Rounds[StepPlan, Exchange] = Rounds(
            trainer,
            min_available=min_available_nodes,
            waits=self._waits,
            on_round=on_round,
        )
        self._exchange_wait_s = exchange_wait_s
        self._figures: Mapping[str, float] | None = None
        self._returned: ArrayRecord | None = None
        self._timeout_s = exchange_wait_s
        self._evaluate_every = evaluate_every
        # Under a wrapper, which has a start of its own, evaluations stay unknown.
        self._reports = False

    def initial_arrays(self) -> ArrayRecord:
        """Return the trainable values as they are, to be handed to ``start``."""
        return ArrayRecord({n: Array(v) for n, v in self.trainer.values().items()})

    def summary(self) -> None:
        """Log what will be done."""
        partition = self.trainer.partition
        log(INFO, "\t├──> %d layers, spread over the devices", partition.num_blocks)
        log(INFO, "\t└──> Nodes to wait for: %d", self._rounds.min_available)

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
        """Take steps; what ``evaluate_fn`` returns is part of their records.

        Devices return what they hold after the last one.

        A strategy can be started again: it goes on from ``initial_arrays``, with the
        optimizer's moments and the wireless time that it has.

        Parameters
        ----------
        grid, evaluate_fn
            As in ``flwr.serverapp.strategy.Strategy``.
        initial_arrays
            The trainer's arrays, by name; a resumed run goes on from its own.
        num_rounds
            The run's steps, of which a resumed run has done some before.
        timeout
            Bounds the wait for the replies of one exchange from above, seconds.
        train_config, evaluate_config
            Not used: devices are told what to do, and do not evaluate.

        Raises
        ------
        UserError
            ``initial_arrays`` is of another model, or the first step has no devices.
        """
        self._rounds.restart()
        before = self._rounds.rounds_before
        self._returned = None
        self._timeout_s = min(self._exchange_wait_s, timeout)
        self._reports = True

        def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
            is_first, is_last = not server_round, server_round + before == num_rounds
            server_round += before
            if is_last and not is_first:
                self.trainer.collect()
            metrics = None
            if evaluate_fn is not None and (
                is_first or is_last or server_round % self._evaluate_every == 0
            ):
                if not is_first:
                    arrays = self.initial_arrays()
                metrics = evaluate_fn(server_round, arrays)
            self._rounds.report(server_round, {} if metrics is None else dict(metrics))
            return metrics

        result = super().start(
            ArrivalGrid(grid),
            self.initial_arrays() if before else initial_arrays,
            num_rounds - before,
            timeout,
            train_config,
            evaluate_config,
            evaluate,
        )
        result.arrays = self.initial_arrays()
        return result

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Take one step; it needs no further messages.

        Raises
        ------
        UserError
            In the first step: too few devices connected, none can be used, or
            ``arrays`` is of another model. Later steps without any device are skipped.
            In any: a wrapper clips updates.
        """
        refuse_clipping()
        if arrays is not self._returned:
            # The first ones, or what a wrapper has changed, for instance by noise.
            self.trainer.start_from({n: a.numpy() for n, a in arrays.items()})
            self._returned = arrays
        step = server_round + self._rounds.rounds_before
        plan = self._rounds.plan(
            step,
            connected=lambda: [str(node) for node in grid.get_node_ids()],
            ask_profiles=lambda new: ask_profiles(
                grid, new, step, self._waits.profiles_s
            ),
        )

        def exchange(requests: Mapping[str, PartRequest]) -> Mapping[str, PartReply]:
            return _exchange(grid, step, requests, self._timeout_s)

        self._figures = None if plan is None else self._rounds.complete(exchange)
        return []

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the metrics of the step that was taken, and the values.

        In a run of its own these are as they were: whoever wants to know them now has
        devices return them. A wrapper is given those of now.
        """
        if self._figures is None:
            return None, None
        if not self._reports:
            self._returned = self.initial_arrays()
        return self._returned, MetricRecord({**self._figures})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Devices do not evaluate: none of them has the model."""
        return []

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Return nothing, since nothing was asked for."""
        if not self._reports:
            self._rounds.report(server_round + self._rounds.rounds_before, {})
        return None


def _exchange(
    grid: Grid, step: int, requests: Mapping[str, PartRequest], wait_s: float
) -> dict[str, PartReply]:
    """Send requests, and wait for the replies.

    Raises
    ------
    PartFailed
        A reply is missing.
    """
    messages = [
        Message(
            RecordDict(
                {
                    "arrays": ArrayRecord(
                        {name: Array(values) for name, values in request.arrays.items()}
                    ),
                    "config": ConfigRecord({**request.task.to_record()}),
                }
            ),
            message_type=f"{MessageType.TRAIN}.{PART_ACTION}",
            dst_node_id=int(device),
            group_id=str(step),
        )
        for device, request in requests.items()
    ]
    replies = {
        str(reply.metadata.src_node_id): PartReply(
            only_arrays(reply.content),
            reply.content.config_records.get(REPORT_KEY, {}),
        )
        for reply in without_errors(
            grid.send_and_receive(messages, timeout=wait_s), step
        )
    }
    missing = [device for device in requests if device not in replies]
    if missing:
        reason = f"no reply within {wait_s:g} s, or an error"
        raise PartFailed(dict.fromkeys(missing, reason))
    return replies
