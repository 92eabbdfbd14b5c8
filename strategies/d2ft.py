"""D2FT as a ``flwr.serverapp.strategy.Strategy`` (Message API)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
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

from lola_flwr.errors import UserError
from lola_flwr.run.records import RoundRecord
from lola_flwr.server.absences import Absences
from lola_flwr.server.spread.exchange import PartFailed, PartReply, PartRequest
from lola_flwr.server.spread.trainer import SpreadTrainer
from lola_flwr.strategies.arrival_grid import ArrivalGrid
from lola_flwr.strategies.message import only_arrays
from lola_flwr.strategies.presence import (
    ask_profiles,
    meet,
    wait_for_devices,
    without_errors,
)
from lola_flwr.strategies.rounds import with_metrics
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
    wait_s
        How long to wait for them before the run ends with an error.
    profile_wait_s
        How long to wait for the profiles of new ones, whose first message starts their
        program.
    exchange_wait_s
        How long to wait for the replies of one exchange; a step in which one is missing
        is skipped.
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
        wait_s: float = 60.0,
        profile_wait_s: float = 300.0,
        exchange_wait_s: float = 300.0,
        on_round: Callable[[RoundRecord], None] | None = None,
    ) -> None:
        self.trainer = trainer
        self.on_round = on_round
        self._min_available = min_available_nodes
        self._wait_s = wait_s
        self._profile_wait_s = profile_wait_s
        self._exchange_wait_s = exchange_wait_s
        # Flower counts each start's rounds from 1; a resumed run has done some before.
        self._steps_before = trainer.server_round
        self._record: RoundRecord | None = None
        self._silent = Absences()
        self._returned: ArrayRecord | None = None
        self._timeout_s = exchange_wait_s
        # Under a wrapper, which has a start of its own, evaluations stay unknown.
        self._reports = False

    def initial_arrays(self) -> ArrayRecord:
        """Return the trainable values, to be handed to ``start``."""
        return ArrayRecord({n: Array(v) for n, v in self.trainer.state().items()})

    def summary(self) -> None:
        """Log what will be done."""
        partition = self.trainer.partition
        log(INFO, "\t├──> %d layers, spread over the devices", partition.num_blocks)
        log(INFO, "\t└──> Nodes to wait for: %d", self._min_available)

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
        before = 0 if self._record is not None else self.trainer.server_round
        self._steps_before, self._record, self._returned = before, None, None
        self._timeout_s = min(self._exchange_wait_s, timeout)
        self._reports = True

        def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
            metrics = None
            if evaluate_fn is not None:
                metrics = evaluate_fn(server_round + before, arrays)
            self._report(dict(metrics or {}))
            return metrics

        return super().start(
            ArrivalGrid(grid),
            self.initial_arrays() if before else initial_arrays,
            num_rounds - before,
            timeout,
            train_config,
            evaluate_config,
            evaluate,
        )

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
        step = server_round + self._steps_before
        start = time.perf_counter()

        def exchange(requests: Mapping[str, PartRequest]) -> Mapping[str, PartReply]:
            return _exchange(grid, step, requests, self._timeout_s)

        try:
            devices = wait_for_devices(
                lambda: [str(node) for node in grid.get_node_ids()],
                needed=self._min_available if self._record is None else 1,
                wait_s=self._wait_s,
            )
            self._silent = meet(
                self.trainer,
                devices,
                lambda new: ask_profiles(grid, new, step, self._profile_wait_s),
                server_round=step,
                silent=self._silent,
            )
            record = self.trainer.step(step, devices, exchange)
        except UserError as error:
            if self._record is None and not self._steps_before:
                raise
            record = self.trainer.skip(step, str(error))
        self._record = replace(record, measured_s=time.perf_counter() - start)
        for line in self._record.lines():
            log(WARNING if record.skipped else INFO, "%s", line)
        return []

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the values and the metrics of the step that was taken."""
        record = self._record
        if record is None or record.train_loss is None:
            return None, None
        self._returned = self.initial_arrays()
        return self._returned, MetricRecord(
            {
                "train_loss": record.train_loss,
                "wireless_s": record.wireless_s,
                "sent_bytes": record.sent_bytes,
                "received_bytes": record.received_bytes,
            }
        )

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
            self._report({})
        return None

    def _report(self, metrics: Mapping[str, object]) -> None:
        if self._record is not None and self.on_round is not None:
            self.on_round(with_metrics(self._record, metrics))


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
