"""LoLa-DEFT as a ``flwr.server.strategy.Strategy``."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from logging import INFO, WARNING

from flwr.common import (
    FitIns,
    FitRes,
    GetPropertiesIns,
    MetricsAggregationFn,
    NDArrays,
    Parameters,
    Scalar,
    ndarrays_to_parameters,
)
from flwr.common.logger import log
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import FedAvg

from lola_flwr.coordinator import Coordinator, DeviceReply, RoundPlan
from lola_flwr.errors import UserError
from lola_flwr.round_log import RoundRecord
from lola_flwr.system.devices import InvalidProfile

EvaluateFunction = Callable[
    [int, NDArrays, dict[str, Scalar]], tuple[float, dict[str, Scalar]] | None
]
ConfigFunction = Callable[[int], dict[str, Scalar]]

# Asking a device for its profile costs it no computation; more threads than this would
# only queue up at the server.
_MAX_PROFILE_REQUESTS = 256


class LoLaDeft(FedAvg):
    """Each active device trains one block; the server assembles and steps.

    Evaluation, on the server and on clients, is inherited from FedAvg; so are the names
    of the arguments that say how.

    Parameters
    ----------
    coordinator
        Plans rounds and holds the model's trainable values.
    min_available_clients
        Devices that must be connected before a round is planned (default: as many as
        the model has blocks).
    wait_s
        How long to wait for them before the run ends with an error.
    on_round
        Called with each round's record, after its evaluation.
    evaluate_fn, on_evaluate_config_fn, evaluate_metrics_aggregation_fn
        As in ``flwr.server.strategy.FedAvg``.
    fraction_evaluate
        Share of the clients that evaluate the model on their own data (default: none,
        since every message costs a device seconds).
    on_fit_config_fn
        Gives a round's further configuration for the clients, beside the assignment.

    References
    ----------
    .. [1] Wu, Chen, Huang, "Resource Management for Low-latency Cooperative
       Fine-tuning of Foundation Models at the Network Edge", arXiv:2407.09873.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        *,
        min_available_clients: int | None = None,
        wait_s: float = 60.0,
        on_round: Callable[[RoundRecord], None] | None = None,
        evaluate_fn: EvaluateFunction | None = None,
        fraction_evaluate: float = 0.0,
        on_fit_config_fn: ConfigFunction | None = None,
        on_evaluate_config_fn: ConfigFunction | None = None,
        evaluate_metrics_aggregation_fn: MetricsAggregationFn | None = None,
    ) -> None:
        if min_available_clients is None:
            min_available_clients = coordinator.partition.num_blocks
        super().__init__(
            # FedAvg warns of minima that exceed the clients; LoLa has its own.
            min_fit_clients=min(2, min_available_clients),
            min_evaluate_clients=min(2, min_available_clients),
            min_available_clients=min_available_clients,
            evaluate_fn=evaluate_fn,
            fraction_evaluate=fraction_evaluate,
            on_fit_config_fn=on_fit_config_fn,
            on_evaluate_config_fn=on_evaluate_config_fn,
            evaluate_metrics_aggregation_fn=evaluate_metrics_aggregation_fn,
        )
        self.coordinator = coordinator
        self._wait_s = wait_s
        self._on_round = on_round
        self._plan: RoundPlan | None = None
        self._record: RoundRecord | None = None
        self._configure_s = 0.0

    def initialize_parameters(self, client_manager: ClientManager) -> Parameters:
        """Return the coordinator's values: blocks from the input on, then the head."""
        return self._parameters()

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        """Ask new devices for their profiles, allocate, and instruct active devices.

        Raises
        ------
        UserError
            In the first round: too few devices connected, or the devices cannot
            compute all blocks. Later rounds without enough devices are skipped.
        """
        self._plan = None
        try:
            clients = self._wait_for_clients(client_manager)
            self._ask_profiles(clients, server_round)
            start = time.perf_counter()
            plan = self.coordinator.plan_round(server_round, clients)
        except UserError as error:
            if self._record is None:
                raise
            self._record = self.coordinator.skip_round(server_round, str(error))
            log(WARNING, "%s", self._record.lines()[0])
            return []
        self._plan = plan
        extra: Mapping[str, Scalar] = {}
        if self.on_fit_config_fn is not None:
            extra = self.on_fit_config_fn(server_round)
        instructions = [
            (clients[device], FitIns(parameters, {**extra, **assignment.to_record()}))
            for device, assignment in plan.assignments.items()
        ]
        self._configure_s = time.perf_counter() - start
        return instructions

    def aggregate_fit(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, FitRes]],
        failures: list[tuple[ClientProxy, FitRes] | BaseException],
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        """Assemble the block gradients and take one server step."""
        for failure in failures:
            reason = failure[1].status if isinstance(failure, tuple) else failure
            log(WARNING, "round %s: a device failed: %s", server_round, reason)
        if self._plan is None:
            return None, {}
        start = time.perf_counter()
        record = self.coordinator.complete_round(
            self._plan,
            [
                DeviceReply(
                    device_id=proxy.cid,
                    tensors=result.parameters.tensors,
                    num_examples=result.num_examples,
                    report=result.metrics,
                )
                for proxy, result in results
            ],
        )
        parameters = self._parameters()
        aggregate_s = time.perf_counter() - start
        self._record = replace(
            record, measured_strategy_s=self._configure_s + aggregate_s
        )
        for line in record.lines():
            log(INFO, "%s", line)
        metrics: dict[str, Scalar] = {
            "round_s": record.round_s,
            "wireless_s": record.wireless_s,
            "refused": sum(record.refused.values()),
        }
        if record.train_loss is not None:
            metrics["train_loss"] = record.train_loss
        return parameters, metrics

    def evaluate(
        self, server_round: int, parameters: Parameters
    ) -> tuple[float, dict[str, Scalar]] | None:
        """Evaluate on the server, if an ``evaluate_fn`` was given; report the round."""
        result = super().evaluate(server_round, parameters)
        record = self._record
        if record is not None and record.server_round == server_round:
            if result is not None:
                loss, metrics = result
                numbers = {k: float(v) for k, v in metrics.items() if _is_number(v)}
                record = replace(record, metrics={"loss": float(loss), **numbers})
            if self._on_round is not None:
                self._on_round(record)
        return result

    def _parameters(self) -> Parameters:
        return ndarrays_to_parameters(list(self.coordinator.state().values()))

    def _wait_for_clients(self, manager: ClientManager) -> dict[str, ClientProxy]:
        # ClientManager.wait_for would sleep through Flower's own 5 s updates of the
        # list; num_available makes one.
        deadline = time.monotonic() + self._wait_s
        while manager.num_available() < self.min_available_clients:
            if time.monotonic() > deadline:
                raise UserError(
                    f"{manager.num_available()} devices are connected after "
                    f"{self._wait_s:g} s; {self.min_available_clients} are needed (the "
                    f"model has {self.coordinator.partition.num_blocks} blocks). Start "
                    "more SuperNodes, or in a simulation pass --federation-config "
                    f"'num-supernodes={self.min_available_clients}'."
                )
            time.sleep(0.1)
        return dict(manager.all())

    def _ask_profiles(
        self, clients: Mapping[str, ClientProxy], server_round: int
    ) -> None:
        """Ask all unknown devices for their profiles, at once."""
        unknown = self.coordinator.meet_devices(clients)
        if not unknown:
            return

        def ask(device: str) -> Mapping[str, Scalar] | Exception:
            try:
                return (
                    clients[device]
                    .get_properties(
                        GetPropertiesIns({}), timeout=None, group_id=server_round
                    )
                    .properties
                )
            # Flower raises whatever went wrong on the device or on the way; the device
            # is left out of this round and asked again in the next.
            except Exception as error:
                return error

        workers = min(len(unknown), _MAX_PROFILE_REQUESTS)
        with ThreadPoolExecutor(max_workers=workers) as pool:
            answers = list(pool.map(ask, unknown))
        for device, answer in zip(unknown, answers, strict=True):
            try:
                if isinstance(answer, Exception):
                    raise InvalidProfile(f"no profile received: {answer}")
                self.coordinator.add_device(device, answer)
            except InvalidProfile as error:
                log(WARNING, "device %s is left out: %s", device, error)


def _is_number(value: Scalar) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
