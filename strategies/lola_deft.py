"""LoLa-DEFT as a ``flwr.server.strategy.Strategy``."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from logging import WARNING
from typing import Any

from flwr.common import (
    EvaluateIns,
    EvaluateRes,
    FitIns,
    FitRes,
    Parameters,
    Scalar,
    ndarray_to_bytes,
    parameters_to_ndarrays,
)
from flwr.common.logger import log
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import FedAvg

from lola_flwr.device.own_training import Model
from lola_flwr.errors import UserError, quoted
from lola_flwr.model.statistics import statistics_names
from lola_flwr.server.coordinator import Coordinator
from lola_flwr.server.replies import DeviceReply
from lola_flwr.strategies.arrival_grid import ArrivalGrid, seconds_of
from lola_flwr.strategies.block_rounds import BlockRounds
from lola_flwr.strategies.metrics import capped_weights, usable_metrics
from lola_flwr.strategies.presence import ask_clients
from lola_flwr.strategies.rounds import OnRound, Waits
from lola_flwr.strategies.served import (
    Served,
    arguments_of,
    divided,
    say_without_meaning,
)
from lola_flwr.strategies.wrappers import refuse_clipping_on_server
from lola_flwr.wire.records import PLACES_KEY, SECAGG_REFUSAL, Assignment, unmarked

_WITHOUT_MEANING = {
    "inplace": "a block's updates are put together apart from the model, either way."
}


class LoLaDeft(FedAvg):
    """Each active device trains one block; the server assembles and steps.

    In a project it takes the place of ``flwr.server.strategy.FedAvg``, with the model
    before FedAvg's arguments: ``LoLaDeft(model, initial_parameters=parameters)``. Which
    arrays are exchanged, the initial ones tell: ``initial_parameters``, or those that
    Flower asks a client for.

    Parameters
    ----------
    coordinator
        Plans rounds and holds the model's trainable values; or the model itself, of
        which ``coordinator_for_weights`` makes it.
    waits
        How long to wait for devices, their profiles, and a round's replies. That a
        round ends at its deadline takes ``lola_flwr.strategies.run_rounds``: Flower's
        own loop knows of nothing but ``ServerConfig.round_timeout``.
    on_round
        Called with each round's record, after its evaluation.
    **options
        FedAvg's arguments, with FedAvg's meaning; and of a model the arguments of
        ``coordinator_for_weights``. ``fraction_fit`` and ``min_fit_clients`` say how
        many devices are drawn that a round may ask; the allocation says what of. Of a
        coordinator no device evaluates unless ``fraction_evaluate`` says so, and the
        first round waits for as many devices as the model has blocks, or for fewer if
        no more come, unless ``min_available_clients`` says how many.

    References
    ----------
    .. [1] Wu, Chen, Huang, "Resource Management for Low-latency Cooperative
       Fine-tuning of Foundation Models at the Network Edge", arXiv:2407.09873.
    """

    def __init__(
        self,
        coordinator: Coordinator | Model,
        *,
        waits: Waits | None = None,
        on_round: OnRound | None = None,
        **options: Any,
    ) -> None:
        ours, theirs = divided(options)
        given = arguments_of(FedAvg, (), theirs)
        say_without_meaning(given, _WITHOUT_MEANING)
        # FedAvg warns of minima that exceed the clients.
        least = min(2, given.get("min_available_clients", 2))
        minima = {"min_fit_clients": least, "min_evaluate_clients": least}
        super().__init__(**{**minima, **given})
        is_project = not isinstance(coordinator, Coordinator)
        # As FedAvg waits: for those whom it draws at least.
        least = max(self.min_available_clients, self.min_fit_clients)
        waits_for_given = is_project or "min_available_clients" in given
        self._served: Served[bytes] = Served(
            coordinator,
            ours,
            encode=ndarray_to_bytes,
            min_available=least if waits_for_given else None,
            waits=waits,
            on_round=on_round,
        )
        if not is_project:
            self.fraction_evaluate = given.get("fraction_evaluate", 0.0)
            self.min_available_clients = self._rounds.min_available
        self._returned: Parameters | None = None
        self._awaits_arrays = is_project and self.initial_parameters is None
        if self.initial_parameters is not None:
            self._start_from(self.initial_parameters)
            self.initial_parameters = None
        # Tells how long uploads took; ``run_rounds`` sets it.
        self.arrivals: ArrivalGrid | None = None

    @property
    def coordinator(self) -> Coordinator:
        """Plans rounds and holds the model's trainable values."""
        return self._served.coordinator

    @property
    def _rounds(self) -> BlockRounds:
        return self._served.rounds

    def wait_s(self, came_s: Sequence[float] = (), failed: int = 0) -> float:
        """Return how long the present round's replies may take, in seconds.

        Parameters
        ----------
        came_s
            After how many seconds those came that are there.
        failed
            Devices that said they failed.
        """
        seconds: float = self._rounds.wait_s(came_s, failed)
        return seconds

    def initialize_parameters(self, client_manager: ClientManager) -> Parameters | None:
        """Return the arrays to start from; None: Flower asks a client for them."""
        return None if self._awaits_arrays else self._parameters()

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
        # The plan says which of these arrays each device is sent.
        parameters = self._take_in(parameters)
        server_round += self._rounds.rounds_before
        clients: dict[str, ClientProxy] = {}

        def connected() -> Mapping[str, ClientProxy]:
            client_manager.num_available()  # makes the manager look
            there = dict(client_manager.all())
            clients.update(there)
            return there

        def drawn(devices: Collection[str]) -> int:
            return min(self.num_fit_clients(len(devices))[0], len(devices))

        plan = self._rounds.plan(
            server_round,
            connected=connected,
            ask_profiles=lambda devices: ask_clients(
                clients, devices, server_round, self._served.waits.profiles_s
            ),
            draw=lambda devices: self.coordinator.draw_trainers(
                server_round, devices, drawn(devices)
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
                self._told(plan.assignments[device], extra),
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

        Returns
        -------
        The arrays, and the round's figures with the project's own metrics, as its
        ``fit_metrics_aggregation_fn`` aggregates those of devices whose updates could
        be used.

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
        if failures and not self.accept_failures:
            self._rounds.give_up(
                f"{len(failures)} devices failed, and accept_failures=False."
            )
            return None, {}
        figures = self._rounds.complete(
            DeviceReply(
                device_id=proxy.cid,
                tensors=result.parameters.tensors,
                num_examples=result.num_examples,
                report=unmarked(result.metrics),
                **seconds_of(self.arrivals, proxy.cid),
            )
            for proxy, result in results
        )
        if figures is None:
            return None, {}
        own: Mapping[str, Scalar] = {}
        if self.fit_metrics_aggregation_fn is not None:
            usable = usable_metrics(
                (result.num_examples, result.metrics)
                for proxy, result in results
                if proxy.cid in self._rounds.accepted
            )
            own = self.fit_metrics_aggregation_fn(usable) if usable else {}
        return self._parameters(), {**figures, **own}

    def configure_evaluate(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, EvaluateIns]]:
        """Have devices evaluate, drawn from the run's seed."""
        self._rounds.require_complete(self)
        if self.fraction_evaluate == 0.0:
            return []
        server_round += self._rounds.rounds_before
        config: Mapping[str, Scalar] = {}
        if self.on_evaluate_config_fn is not None:
            config = self.on_evaluate_config_fn(server_round)
        # A copy: Flower changes the list when devices come and go.
        clients = dict(client_manager.all())
        count, _ = self.num_evaluation_clients(len(clients))
        drawn = self.coordinator.draw_evaluators(server_round, clients, count)
        tensors = self._with_constants(parameters).tensors
        named = dict(zip(self.coordinator.arrays(), tensors, strict=True))
        # Of arrays that a wrapper has changed a device holds nothing.
        unchanged = self._returned is not None and tensors == self._returned.tensors
        contents = (
            self._rounds.evaluation_contents(drawn, named)
            if unchanged
            else ((device, named, {}) for device in drawn)
        )
        return [
            (
                clients[device],
                EvaluateIns(
                    Parameters([*sent.values()], parameters.tensor_type),
                    {**config, **words},
                ),
            )
            for device, sent, words in contents
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
        weights = capped_weights([result.num_examples for _, result in usable])
        capped = [
            (client, replace(result, num_examples=int(weight)))
            for (client, result), weight in zip(usable, weights, strict=True)
        ]
        return super().aggregate_evaluate(server_round, capped, failures)

    def evaluate(
        self, server_round: int, parameters: Parameters
    ) -> tuple[float, dict[str, Scalar]] | None:
        """Evaluate on the server, if an ``evaluate_fn`` was given; report the round."""
        parameters = self._known(parameters)
        self._rounds.require_complete(self)
        parameters = self._with_constants(parameters)
        server_round += self._rounds.rounds_before
        result = super().evaluate(server_round, parameters)
        metrics: dict[str, Scalar] = {}
        if result is not None:
            metrics = {"loss": float(result[0]), **result[1]}
        self._rounds.report(server_round, metrics)
        return result

    def _parameters(self) -> Parameters:
        tensors = [*self._served.encoded().values()]
        self._returned = Parameters(tensors=tensors, tensor_type="numpy.ndarray")
        return self._returned

    def _start_from(self, parameters: Parameters) -> None:
        """Take in the arrays that a project starts from."""
        arrays = self._served.named(parameters_to_ndarrays(parameters))
        self._served.prepare(arrays)
        self.coordinator.start_from(arrays)

    def _known(self, parameters: Parameters) -> Parameters:
        """Return these arrays; where Flower asked a client for them, take them in."""
        if self._awaits_arrays:
            self._awaits_arrays = False
            if parameters.tensors:
                self._start_from(parameters)
            else:
                log(WARNING, "No initial arrays from the client: the server's are used")
        return parameters if parameters.tensors else self._parameters()

    def _take_in(self, parameters: Parameters) -> Parameters:
        """Make the arrays of this round the coordinator's; return what to send.

        They differ from those returned last where something wrapped around the
        strategy has changed them, for instance by adding noise.
        """
        parameters = self._known(parameters)
        returned = self._returned or self._parameters()
        # Arrays that nobody touched are the same objects: this compares no bytes.
        if parameters.tensors != returned.tensors:
            arrays = parameters_to_ndarrays(parameters)
            names = self.coordinator.arrays()
            self.coordinator.adopt(dict(zip(names, arrays, strict=True)))
            return self._parameters()
        return parameters

    def _told(
        self, assignment: Assignment, extra: Mapping[str, Scalar]
    ) -> dict[str, Scalar]:
        """Return what a device is told: places in a list, where names say nothing."""
        told: dict[str, Scalar] = assignment.beside(extra)
        if self.coordinator.sends_by_name:
            places = {name: n for n, name in enumerate(self.coordinator.arrays())}
            asked = (assignment.update_names or "").splitlines()
            kept = [places[n] for n in (*asked, *statistics_names(places))]
            told[PLACES_KEY] = " ".join(map(str, kept))
        return told

    def _with_constants(self, parameters: Parameters) -> Parameters:
        """Put back what never changes, but to which a wrapper may have added noise."""
        names, constants = self.coordinator.arrays(), self._served.constants
        tensors = [
            constants.get(name, tensor)
            for name, tensor in zip(names, parameters.tensors, strict=True)
        ]
        return Parameters(tensors=tensors, tensor_type=parameters.tensor_type)


def _said(failure: tuple[ClientProxy, FitRes] | BaseException) -> str:
    """Return what a failure says in the end, where a traceback has its error."""
    if isinstance(failure, tuple):
        return quoted(failure[1].status)
    # Flower's workflow hands on the message's error, which is none of Python's.
    told = [getattr(part, "reason", part) for part in failure.args] or [failure]
    # Ray puts angle brackets around it.
    lines = [line for line in str(told[0]).splitlines() if line.strip(" >")] or [""]
    return quoted(lines[-1].rpartition("Message: ")[2])
