"""The legacy strategy under Flower's own server loop, with devices in this process."""

from __future__ import annotations

import copy
import threading
import time
from collections import Counter

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Error, RecordDict
from flwr.client import ClientApp
from flwr.client.mod import secaggplus_mod
from flwr.common import (
    Code,
    EvaluateRes,
    FitRes,
    GetPropertiesRes,
    Parameters,
    Status,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.compat.common.recorddict_compat import parameters_to_arrayrecord
from flwr.server import LegacyContext, Server, ServerConfig, SimpleClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.compat.grid_client_proxy import GridClientProxy
from flwr.server.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
)
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD, Key
from flwr.supercore.task_identity import TaskIdentity

from lola_flwr.build import DeviceOptions, RoundSettings, coordinator_for_weights
from lola_flwr.clients import BlockClient, BlockDevice
from lola_flwr.costs.estimated import estimate_costs
from lola_flwr.errors import UserError
from lola_flwr.model.blocks import partition_parameters
from lola_flwr.model.loading import fingerprint
from lola_flwr.strategies import LoLaDeft, Waits, lola_deft
from lola_flwr.system.devices import simulated_device
from tests.flat_settings import coordinator_of
from tests.strategies.in_process import InProcessGrid


class Device(ClientProxy):
    """A device in this process; counts its messages, and fails where it is told to."""

    def __init__(self, index, model, batch):
        super().__init__(f"node-{index}")
        partition = partition_parameters(n for n, _ in model.named_parameters())
        self.profile = simulated_device(index, seed=2)
        self.messages = Counter()
        self.configs = []
        self.fails = set()
        self._client = BlockClient(
            BlockDevice(
                profile=self.profile,
                load_model=lambda: (model, partition),
                batch_source=lambda _, size: {k: v[:size] for k, v in batch.items()},
            )
        ).to_client()

    def get_properties(self, ins, timeout, group_id):
        self.messages["get_properties"] += 1
        if "get_properties" in self.fails:
            raise ValueError("device out of reach")
        return self._client.get_properties(ins)

    def fit(self, ins, timeout, group_id):
        self.messages["fit"] += 1
        self.configs.append(ins.config)
        if "raise" in self.fails:
            raise ValueError("device out of reach")
        result = self._client.fit(ins)
        if "status" in self.fails:
            result.status = Status(Code.FIT_NOT_IMPLEMENTED, "no")
        if "garbage" in self.fails:
            return FitRes(result.status, Parameters([b"x"], ""), 6, result.metrics)
        return result

    def get_parameters(self, ins, timeout, group_id):
        raise AssertionError("the strategy has the initial parameters")

    evaluate = reconnect = get_parameters


@pytest.fixture
def federation(roberta, batch):
    """Return a function that makes a strategy, its server and devices."""

    def make(num_devices=4, **options):
        model = copy.deepcopy(roberta)
        parameters = dict(model.named_parameters())
        partition = partition_parameters(parameters)
        shapes = {name: tuple(p.shape) for name, p in parameters.items()}
        values = {n: parameters[n].numpy(force=True) for n in partition.trainable}
        coordinator = coordinator_of(
            partition,
            values,
            estimate_costs(shapes, partition, batch_size=6, sequence_length=10),
            bandwidth_hz=1e6,
            lr=1e-2,
            base_fingerprint=fingerprint(model, partition.frozen),
            batch_size=6,
        )
        strategy = LoLaDeft(coordinator, **options)
        server = Server(client_manager=SimpleClientManager(), strategy=strategy)
        server.disconnect_all_clients = lambda timeout: None
        # Flower's server talks to its clients in threads: each has a model of its own.
        devices = [
            Device(index, copy.deepcopy(model), batch) for index in range(num_devices)
        ]
        for device in devices:
            server.client_manager().register(device)
        return server, devices

    return make


def test_rounds_lower_the_loss_and_cost_one_message_each(federation):
    records = []
    server, devices = federation(on_round=records.append)
    history, _ = server.fit(num_rounds=12, timeout=None)
    assert [device.messages["get_properties"] for device in devices] == [1] * 4
    assert sum(device.messages["fit"] for device in devices) == 12 * 3
    assert [record.server_round for record in records] == list(range(1, 13))
    losses = [loss for _, loss in history.metrics_distributed_fit["train_loss"]]
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.05
    wireless = [value for _, value in history.metrics_distributed_fit["wireless_s"]]
    assert wireless == sorted(wireless)
    assert records[-1].measured_strategy_s > 0


def test_what_goes_out_is_in_the_blocks_order(federation):
    server, _ = federation()
    strategy = server.strategy
    arrays = parameters_to_ndarrays(strategy.initialize_parameters(None))
    state = strategy.coordinator.values()
    assert list(state) == list(strategy.coordinator.partition.trainable)
    for array, values in zip(arrays, state.values(), strict=True):
        np.testing.assert_array_equal(array, values)


@pytest.mark.parametrize("failure", ["raise", "status", "garbage"])
def test_a_failing_device_costs_its_block_only(federation, failure):
    records = []
    server, devices = federation(num_devices=3, on_round=records.append)
    before = {k: v.copy() for k, v in server.strategy.coordinator.values().items()}
    devices[1].fails.add(failure)
    server.fit(num_rounds=1, timeout=None)
    (record,) = records
    lost = next(b for b in record.blocks if b.device == devices[1].profile.name)
    assert lost.status != "accepted"
    assert sum(block.status == "accepted" for block in record.blocks) == 2
    partition = server.strategy.coordinator.partition
    after = server.strategy.coordinator.values()
    for index, names in enumerate(partition.blocks):
        changed = any(not np.array_equal(before[n], after[n]) for n in names)
        assert changed == (index != lost.block_index)


def test_a_device_without_a_profile_is_left_out_and_asked_again(federation):
    server, devices = federation()
    devices[0].fails.add("get_properties")
    server.fit(num_rounds=2, timeout=None)
    assert devices[0].messages == {"get_properties": 2}
    devices[0].fails.clear()
    server.fit(num_rounds=1, timeout=None)
    assert devices[0].messages["get_properties"] == 3
    assert devices[1].messages["get_properties"] == 1


def test_a_profile_that_lies_is_left_out(federation, monkeypatch):
    server, devices = federation()
    monkeypatch.setattr(
        devices[0],
        "get_properties",
        lambda *_, **__: GetPropertiesRes(
            Status(Code.OK, ""), {"name": "x", "flops-per-s": float("inf")}
        ),
    )
    server.fit(num_rounds=1, timeout=None)
    assert devices[0].messages["fit"] == 0


def test_too_few_devices_end_the_run_with_what_to_do(federation):
    server, _ = federation(
        num_devices=2, min_available_clients=3, waits=Waits(devices_s=0.2)
    )
    with pytest.raises(UserError, match=r"2 devices are connected after 0.2 s; 3 are"):
        server.fit(num_rounds=1, timeout=None)


def test_later_rounds_go_on_with_who_is_there_and_are_skipped_without_anybody(
    federation,
):
    records = []
    server, devices = federation(
        num_devices=3, waits=Waits(devices_s=0.2), on_round=records.append
    )
    manager = server.client_manager()

    def leave_and_come_back(record):
        records.append(record)
        for device in {1: devices[:1], 2: devices[1:]}.get(record.server_round, []):
            manager.unregister(device)
        for device in devices if record.server_round == 3 else []:
            manager.register(device)

    server.strategy._rounds.on_round = leave_and_come_back
    server.fit(num_rounds=4, timeout=None)
    assert [record.skipped is None for record in records] == [True, True, False, True]
    assert [len(record.blocks) for record in records] == [3, 2, 0, 3]
    assert records[1].wireless_s == records[2].wireless_s < records[3].wireless_s
    assert "0 devices are connected" in records[2].skipped


def test_evaluation_belongs_to_the_round(federation):
    records = []
    server, _ = federation(
        on_round=records.append,
        evaluate_fn=lambda server_round, arrays, config: (
            (0.25, {"accuracy": 0.5, "note": "text", "flag": True})
            if server_round in (0, 2)
            else None
        ),
    )
    server.fit(num_rounds=2, timeout=None)
    assert records[0].metrics == {}
    assert records[1].metrics == {"loss": 0.25, "accuracy": 0.5}
    # What the run started from has no record of its own.
    assert records[0].start_metrics == {"loss": 0.25, "accuracy": 0.5}
    assert records[1].start_metrics == {}
    assert all(record.measured_round_s > 0 for record in records)


def test_further_configuration_reaches_the_devices(federation):
    server, devices = federation(
        on_fit_config_fn=lambda server_round: {"temperature": 0.1, "share": 7.0}
    )
    server.fit(num_rounds=1, timeout=None)
    configs = [config for device in devices for config in device.configs]
    assert all(config["temperature"] == 0.1 for config in configs)
    assert all(config["share"] == 7.0 for config in configs), "theirs stay"
    assert all(config["lola-share"] <= 1 for config in configs)
    assert len({id(config) for config in configs}) == len(configs)


def test_a_client_that_knows_nothing_takes_part(federation, roberta):
    """Its whole model comes back by position, as FedAvg sends and expects it."""
    records = []
    _, devices = federation(num_devices=3)
    coordinator = coordinator_for_weights(
        roberta,
        batch_size=6,
        settings=RoundSettings(
            devices=DeviceOptions(assumed_profile=simulated_device(0, seed=0))
        ),
    )
    strategy = LoLaDeft(coordinator, on_round=records.append)
    server = Server(client_manager=SimpleClientManager(), strategy=strategy)
    server.disconnect_all_clients = lambda timeout: None
    sent = list(coordinator.arrays().values())
    assert len(sent) == len(roberta.state_dict())

    def fit(ins, timeout, group_id):
        arrays = parameters_to_ndarrays(ins.parameters)
        moved = [array + np.float32(0.3) for array in arrays[:-1]]
        parameters = ndarrays_to_parameters([*moved, arrays[-1]])
        return FitRes(Status(Code.OK, ""), parameters, 100, {"loss": 0.5})

    for device in devices:
        device.get_properties = lambda ins, timeout, group_id: GetPropertiesRes(
            Status(Code.OK, ""), {}
        )
        device.fit = fit
        server.client_manager().register(device)
    server.fit(num_rounds=1, timeout=None)
    (record,) = records
    assert record.refused == {}
    assert all(block.ignored_arrays for block in record.blocks)
    # A block moves by a third, unless the whole update was scaled down.
    for names in coordinator.partition.blocks:
        move = coordinator.values()[names[0]] - roberta.get_parameter(names[0]).numpy(
            force=True
        )
        np.testing.assert_allclose(move, move.flat[0], rtol=1e-3)
        assert 0.01 < move.flat[0] <= 0.1 + 1e-6


def test_odd_evaluations_are_left_out(federation):
    server, devices = federation()
    ok = Status(Code.OK, "")
    results = [
        (devices[0], EvaluateRes(ok, 0.5, 10, {})),
        (devices[1], EvaluateRes(ok, float("nan"), 10, {})),
        (devices[2], EvaluateRes(ok, 0.1, -10, {})),
        (devices[3], EvaluateRes(ok, 0.1, 0, {})),
    ]
    loss, _ = server.strategy.aggregate_evaluate(1, results, [])
    assert loss == 0.5
    assert server.strategy.aggregate_evaluate(1, results[1:], []) == (None, {})


def test_what_a_wrapper_changes_is_what_goes_on(federation):
    server, _ = federation()
    strategy = server.strategy
    parameters = strategy.initialize_parameters(None)
    arrays = [array + 1 for array in parameters_to_ndarrays(parameters)]
    strategy.configure_fit(1, ndarrays_to_parameters(arrays), server.client_manager())
    for array, values in zip(
        arrays, strategy.coordinator.arrays().values(), strict=True
    ):
        np.testing.assert_array_equal(array, values)


def test_the_words_of_a_failing_device_stay_on_one_line(federation, caplog):
    server, devices = federation(num_devices=3)

    def fail(*_, **__):
        raise ValueError("x\nround 9: all is well\x1b[2J" + "y" * 10_000)

    devices[0].fit = fail
    with caplog.at_level("WARNING", logger="flwr"):
        server.fit(num_rounds=1, timeout=None)
    (message,) = [r.getMessage() for r in caplog.records if "failed" in r.getMessage()]
    assert "\n" not in message
    assert "\x1b" not in message
    assert len(message) < 300


def test_a_silent_device_does_not_hold_the_round_up(federation, caplog):
    records = []
    server, devices = federation(
        num_devices=4, waits=Waits(profiles_s=0.3), on_round=records.append
    )
    released = threading.Event()
    devices[0].get_properties = lambda *_, **__: released.wait(30)
    start = time.monotonic()
    server.fit(num_rounds=1, timeout=None)
    released.set()
    assert time.monotonic() - start < 20
    assert records[0].num_devices == 3
    assert "no profile from device node-0: none after 0.3 s" in caplog.text


def test_claims_of_examples_are_capped(federation):
    server, devices = federation()
    ok = Status(Code.OK, "")
    honest = [(device, EvaluateRes(ok, 1.0, 10, {})) for device in devices[:3]]
    lie = (devices[3], EvaluateRes(ok, 2.0, 10**15, {}))
    loss, _ = server.strategy.aggregate_evaluate(1, [*honest, lie], [])
    # The lie weighs 100, the others 10 each.
    assert loss == pytest.approx((30 * 1.0 + 100 * 2.0) / 130)


def test_evaluating_clients_have_a_minimum(federation):
    server, _ = federation(fraction_evaluate=0.25, min_evaluate_clients=3)
    parameters = server.strategy.initialize_parameters(None)
    manager = server.client_manager()
    assert len(server.strategy.configure_evaluate(1, parameters, manager)) == 3


@pytest.mark.parametrize(
    "wrapper",
    [
        DifferentialPrivacyServerSideFixedClipping,
        DifferentialPrivacyServerSideAdaptiveClipping,
    ],
)
def test_clipping_on_the_server_is_refused(federation, wrapper):
    server, _ = federation()
    options = {"noise_multiplier": 0.1, "num_sampled_clients": 3}
    if wrapper is DifferentialPrivacyServerSideFixedClipping:
        options["clipping_norm"] = 1.0
    server.strategy = wrapper(server.strategy, **options)
    with pytest.raises(UserError, match="in the ClientSide class of that name"):
        server.fit(num_rounds=1, timeout=None)


def test_noise_goes_to_what_is_trained_only(federation, roberta):
    evaluated = []

    def evaluate(server_round, arrays, config):
        evaluated.append(dict(zip(names, arrays, strict=True)))

    coordinator = coordinator_for_weights(
        roberta,
        batch_size=6,
        settings=RoundSettings(
            devices=DeviceOptions(assumed_profile=simulated_device(0, seed=0))
        ),
    )
    names = list(coordinator.arrays())
    before = {name: values.copy() for name, values in coordinator.arrays().items()}
    inner = LoLaDeft(coordinator, evaluate_fn=evaluate)
    server, devices = federation(num_devices=3)
    server.strategy = DifferentialPrivacyClientSideFixedClipping(inner, 0.1, 1.0, 3)
    for device in devices:
        device.get_properties = lambda ins, timeout, group_id: GetPropertiesRes(
            Status(Code.OK, ""), {}
        )
        device.fit = lambda ins, timeout, group_id: FitRes(
            Status(Code.OK, ""), copy.deepcopy(ins.parameters), 6, {}
        )
    server.fit(num_rounds=2, timeout=None)
    trainable = set(coordinator.partition.trainable)
    for name, values in evaluated[-1].items():
        changed = not np.array_equal(values, before[name])
        assert changed == (name in trainable), name


def test_secure_aggregation_is_refused(federation, monkeypatch):
    """Through Flower's own workflow and mod, without a DeadlineGrid."""
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    server, devices = federation(num_devices=3)
    states = {100 + index: RecordDict() for index in range(3)}

    def make_app(index, mods):
        app = ClientApp(lambda _: devices[index]._client, mods=mods)

        def answer(message, context):
            # As on a network, each device has a content of its own; the mod keeps its
            # keys in the device's state.
            message.content = copy.deepcopy(message.content)
            state = states[context.node_id]
            return app(message, Context(1, context.node_id, {}, state, {}))

        return answer

    def run(mods):
        grid = InProcessGrid({100 + i: make_app(i, mods) for i in range(3)})
        manager = SimpleClientManager()
        for node in grid.apps:
            manager.register(GridClientProxy(node, grid, 1))
        context = LegacyContext(
            Context(1, 0, {}, RecordDict(), {}),
            config=ServerConfig(num_rounds=1),
            strategy=server.strategy,
            client_manager=manager,
        )
        arrays = server.strategy.initialize_parameters(None)
        context.state.array_records[MAIN_PARAMS_RECORD] = parameters_to_arrayrecord(
            arrays, keep_input=True
        )
        context.state.config_records[MAIN_CONFIGS_RECORD] = ConfigRecord(
            {Key.CURRENT_ROUND: 1}
        )
        SecAggPlusWorkflow(num_shares=3, reconstruction_threshold=2)(grid, context)

    with pytest.raises(UserError, match="take the SecAgg mod and workflow out"):
        run([secaggplus_mod])


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (
            # As Flower's simulation hands it on.
            Exception(
                Error(
                    code=2,
                    reason="<class 'ray.exceptions.RayTaskError(ClientAppException)'>:<"
                    "\x1b[36mray::ClientAppActor.run()\x1b[39m (pid=7)\n  File ...\n"
                    "flwr.clientapp.client_app.ClientAppException: \nException "
                    "ClientAppException occurred. Message: Raise alpha.\n>",
                )
            ),
            "'Raise alpha.'",
        ),
        (Exception(Error(code=0, reason="KeyError('a')")), "\"KeyError('a')\""),
        (Exception("the node is gone\n\n"), "'the node is gone'"),
        (Exception(), "''"),
        (Exception(Error(code=0, reason="x" * 10**6)), repr("x" * 200)[:200]),
    ],
)
def test_a_failure_is_logged_by_what_it_says_in_the_end(failure, said):
    assert lola_deft._said(failure) == said
