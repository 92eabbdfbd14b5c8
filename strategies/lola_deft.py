"""LoLa-DEFT as a ``flwr.server.strategy.Strategy``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from logging import WARNING

from flwr.common import (
    EvaluateIns,
    EvaluateRes,
    FitIns,
    FitRes,
    GetPropertiesIns,
    MetricsAggregationFn,
    NDArrays,
    Parameters,
    Scalar,
    ndarray_to_bytes,
    parameters_to_ndarrays,
)
from flwr.common.logger import log
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import FedAvg

from lola_flwr.errors import UserError, quoted
from lola_flwr.server.coordinator import Coordinator
from lola_flwr.server.replies import DeviceReply
from lola_flwr.strategies.arrival_grid import ArrivalGrid, upload_seconds
from lola_flwr.strategies.rounds import (
    BlockRounds,
    OnRound,
    Waits,
    evaluation_weights,
)
from lola_flwr.strategies.wrappers import refuse_clipping_on_server
from lola_flwr.wire.records import SECAGG_REFUSAL

EvaluateFunction = Callable[
    [int, NDArrays, dict[str, Scalar]], tuple[float, dict[str, Scalar]] | None
]
ConfigFunction = Callable[[int], dict[str, Scalar]]

# Asking a device for its profile costs it no computation; more threads than this would
# only queue up at the server.
_MAX_PROFILE_REQUESTS = 256


class LoLaDeft(FedAvg):
    """Each active device trains one block; the server assembles and steps.

    Evaluation, on the server and on clients, is that of FedAvg; so are the names of the
    arguments that say how.

    Parameters
    ----------
    coordinator
        Plans rounds and holds the model's trainable values.
    min_available_clients
        Devices that must be connected before the first round is planned (default: as
        many as the model has blocks). Later rounds go on with those that are there.
    waits
        How long to wait for devices, their profiles, and a round's replies. That a
        round ends at its deadline takes ``lola_flwr.strategies.run_rounds``: Flower's
        own loop knows of nothing but ``ServerConfig.round_timeout``.
    on_round
        Called with each round's record, after its evaluation.
    evaluate_fn, on_evaluate_config_fn, evaluate_metrics_aggregation_fn
        As in ``flwr.server.strategy.FedAvg``.
    fraction_evaluate
        Share of the clients that evaluate the model on their own data (default: none,
        since every message costs a device seconds).
    min_evaluate_clients
        At least so many do, unless ``fraction_evaluate`` is 0.
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
        waits: Waits | None = None,
        on_round: OnRound | None = None,
        evaluate_fn: EvaluateFunction | None = None,
        fraction_evaluate: float = 0.0,
        min_evaluate_clients: int = 2,
        on_fit_config_fn: ConfigFunction | None = None,
        on_evaluate_config_fn: ConfigFunction | None = None,
        evaluate_metrics_aggregation_fn: MetricsAggregationFn | None = None,
    ) -> None:
        self.coordinator = coordinator
        self._waits = waits or Waits()
        self._rounds = BlockRounds(
            coordinator,
            min_available=min_available_clients,
            waits=self._waits,
            on_round=on_round,
        )
        min_available = self._rounds.min_available
        super().__init__(
            # FedAvg warns of minima that exceed the clients; LoLa has its own.
            min_fit_clients=min(2, min_available),
            min_evaluate_clients=min(min_evaluate_clients, min_available),
            min_available_clients=min_available,
            evaluate_fn=evaluate_fn,
            fraction_evaluate=fraction_evaluate,
            on_fit_config_fn=on_fit_config_fn,
            on_evaluate_config_fn=on_evaluate_config_fn,
            evaluate_metrics_aggregation_fn=evaluate_metrics_aggregation_fn,
        )
        # Arrays that never change are encoded once.
        positions = {name: n for n, name in enumerate(coordinator.arrays())}
        self._constants = {
            positions[name]: ndarray_to_bytes(values)
            for name, values in coordinator.constants().items()
        }
        self._returned = self._parameters()
        # Tells how long uploads took; ``run_rounds`` sets it.
        self.arrivals: ArrivalGrid | None = None

    def wait_s(self) -> float:
        """Return how long the present round's replies may take, in seconds."""
        seconds: float = self._rounds.wait_s()
        return seconds

    def initialize_parameters(self, client_manager: ClientManager) -> Parameters:
        """Return the coordinator's arrays, in its order."""
        return self._parameters()

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        """Ask new devices for their profiles, allocate, and instruct active devices.

        Raises
        ------
        UserError
            In the first round: too few devices connected, or the devices cannot
            compute all blocks. Later rounds without any device are skipped. In any: a
            wrapper clips on the server.
        """
        refuse_clipping_on_server()
        server_round += self._rounds.rounds_before
        clients: dict[str, ClientProxy] = {}

        def connected() -> Mapping[str, ClientProxy]:
            client_manager.num_available()  # makes the manager look
            there = dict(client_manager.all())
            clients.update(there)
            return there

        # The plan says which of these arrays each device is sent.
        parameters = self._take_in(parameters)
        plan = self._rounds.plan(
            server_round,
            connected=connected,
            ask_profiles=lambda devices: _ask_profiles(
                clients, devices, server_round, self._waits.profiles_s
            ),
        )
        if plan is None:
            return []
        extra: Mapping[str, Scalar] = {}
        if self.on_fit_config_fn is not None:
            extra = self.on_fit_config_fn(server_round)
        tensors = dict(zip(self.coordinator.arrays(), parameters.tensors, strict=True))
        instructions = []
        for device, sent in self._rounds.contents(plan, tensors, ndarray_to_bytes):
            fit = FitIns(
                Parameters([*sent.values()], parameters.tensor_type),
                {**extra, **plan.assignments[device].to_record()},
            )
            instructions.append((clients[device], fit))
        return instructions

    def aggregate_fit(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, FitRes]],
        failures: list[tuple[ClientProxy, FitRes] | BaseException],
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        """Assemble the block gradients and take one server step.

        Raises
        ------
        UserError
            The results come out of a secure aggregation.
        """
        # Flower's workflow for it gives every device's result the sum of all.
        if len(results) > 1 and len({id(r.parameters) for _, r in results}) == 1:
            raise UserError(SECAGG_REFUSAL)
        server_round += self._rounds.rounds_before
        for failure in failures:
            log(WARNING, "round %s: device failed: %s", server_round, _said(failure))
        metrics = self._rounds.complete(
            DeviceReply(
                device_id=proxy.cid,
                tensors=result.parameters.tensors,
                num_examples=result.num_examples,
                report=result.metrics,
                upload_s=upload_seconds(self.arrivals, proxy.cid),
            )
            for proxy, result in results
        )
        if metrics is None:
            return None, {}
        return self._parameters(), {**metrics}

    def configure_evaluate(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, EvaluateIns]]:
        """Have devices evaluate, drawn from the run's seed."""
        if self.fraction_evaluate == 0.0:
            return []
        server_round += self._rounds.rounds_before
        config: Mapping[str, Scalar] = {}
        if self.on_evaluate_config_fn is not None:
            config = self.on_evaluate_config_fn(server_round)
        # A copy: Flower changes the list when devices come and go.
        clients = dict(client_manager.all())
        count, _ = self.num_evaluation_clients(len(clients))
        parameters = self._with_constants(parameters)
        return [
            (clients[device], EvaluateIns(parameters, dict(config)))
            for device in self.coordinator.draw_evaluators(server_round, clients, count)
        ]

    def aggregate_evaluate(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, EvaluateRes]],
        failures: list[tuple[ClientProxy, EvaluateRes] | BaseException],
    ) -> tuple[float | None, dict[str, Scalar]]:
        """Aggregate the evaluations that can be; others are left out."""
        server_round += self._rounds.rounds_before
        usable = [
            (client, result)
            for client, result in results
            if type(result.num_examples) is int
            and result.num_examples > 0
            and math.isfinite(result.loss)
        ]
        if len(usable) < len(results):
            refused = len(results) - len(usable)
            log(WARNING, "round %s: %s evaluations left out", server_round, refused)
        weights = evaluation_weights([result.num_examples for _, result in usable])
        capped = [
            (client, replace(result, num_examples=int(weight)))
            for (client, result), weight in zip(usable, weights, strict=True)
        ]
        return super().aggregate_evaluate(server_round, capped, failures)

    def evaluate(
        self, server_round: int, parameters: Parameters
    ) -> tuple[float, dict[str, Scalar]] | None:
        """Evaluate on the server, if an ``evaluate_fn`` was given; report the round."""
        parameters = self._with_constants(parameters)
        server_round += self._rounds.rounds_before
        result = super().evaluate(server_round, parameters)
        metrics: dict[str, Scalar] = {}
        if result is not None:
            metrics = {"loss": float(result[0]), **result[1]}
        self._rounds.report(server_round, metrics)
        return result

    def _parameters(self) -> Parameters:
        self._returned = Parameters(
            tensors=[
                self._constants.get(index) or ndarray_to_bytes(values)
                for index, values in enumerate(self.coordinator.arrays().values())
            ],
            tensor_type="numpy.ndarray",
        )
        return self._returned

    def _take_in(self, parameters: Parameters) -> Parameters:
        """Make the arrays of this round the coordinator's; return what to send.

        They differ from those returned last where something wrapped around the
        strategy has changed them, for instance by adding noise.
        """
        # Arrays that nobody touched are the same objects: this compares no bytes.
        if parameters.tensors != self._returned.tensors:
            arrays = parameters_to_ndarrays(parameters)
            names = self.coordinator.arrays()
            self.coordinator.adopt(dict(zip(names, arrays, strict=True)))
            return self._parameters()
        return parameters

    def _with_constants(self, parameters: Parameters) -> Parameters:
        """Put back what never changes, but to which a wrapper may have added noise."""
        tensors = [
            self._constants.get(index, tensor)
            for index, tensor in enumerate(parameters.tensors)
        ]
        return Parameters(tensors=tensors, tensor_type=parameters.tensor_type)


def _ask_profiles(
    clients: Mapping[str, ClientProxy],
    devices: Sequence[str],
    server_round: int,
    wait_s: float,
) -> dict[str, Mapping[str, object]]:
    def ask(device: str) -> Mapping[str, object]:
        answer = clients[device].get_properties(
            GetPropertiesIns({}), timeout=wait_s, group_id=server_round
        )
        return answer.properties

    pool = ThreadPoolExecutor(min(len(devices), _MAX_PROFILE_REQUESTS))
    asked = {device: pool.submit(ask, device) for device in devices}
    wait(asked.values(), timeout=wait_s)
    # The message itself has expired by now: what is still on its way ends soon.
    pool.shutdown(wait=False, cancel_futures=True)
    answers: dict[str, Mapping[str, object]] = {}
    for device, future in asked.items():
        # Flower raises whatever went wrong on the device or on the way.
        try:
            answers[device] = future.result(timeout=0)
        except Exception as error:
            if future.done():
                answers[device] = {}
            reason = quoted(error) if str(error) else f"none after {wait_s:g} s"
            log(WARNING, "no profile from device %s: %s", device, reason)
    return answers


def _said(failure: tuple[ClientProxy, FitRes] | BaseException) -> str:
    """Return what a failure says in the end, where a traceback has its error."""
    if isinstance(failure, tuple):
        return quoted(failure[1].status)
    # Flower's workflow hands on the message's error, which is none of Python's.
    told = [getattr(part, "reason", part) for part in failure.args] or [failure]
    # Ray puts angle brackets around it.
    lines = [line for line in str(told[0]).splitlines() if line.strip(" >")] or [""]
    return quoted(lines[-1].rpartition("Message: ")[2])
