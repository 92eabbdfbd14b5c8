"""What a FedAvg project set, exchanges and measures, under the strategy."""

from __future__ import annotations

import inspect
import itertools
import logging
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, MetricRecord
from flwr.server import Server, SimpleClientManager
from flwr.server.compat.grid_client_proxy import GridClientProxy
from flwr.server.strategy import FedAvg as LegacyFedAvg
from flwr.serverapp.strategy import FedAvg
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords
from flwr.supercore.task_identity import TaskIdentity

from lola_flwr.build import coordinator_for_weights
from lola_flwr.errors import UserError
from lola_flwr.strategies import LoLaDeft as LegacyLoLaDeft
from lola_flwr.strategies.message import LoLaDeft
from lola_flwr.strategies.served import PROJECT_SETTINGS
from tests.marks import rest_slow
from tests.strategies.projects import (
    Adapters,
    Head,
    Project,
    Some,
    Whole,
    adapted,
    exchanged,
    grid_of,
    initial,
    moved,
    net,
    run,
    run_message,
)


@pytest.fixture(autouse=True)
def task(monkeypatch, tmp_path):
    """Flower makes messages only within a task."""
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))


EXCHANGES = {
    "whole": (net, Whole()),
    "own norms": (net, Some("norm", has=False)),
    "head's": (net, Head()),
    "adapters": (adapted, Adapters()),
    "bfloat16 base": (lambda: adapted(torch.bfloat16), Adapters()),
    "adapters in full names": (adapted, Some("lora", has=True)),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", rest_slow(EXCHANGES, fast=1))
def test_what_a_project_exchanges_is_exchanged(kind, legacy):
    make, exchange = EXCHANGES[kind]
    project = Project(make, exchange)
    grid, records, arrays = run(project, legacy=legacy)
    assert [record.refused for record in records] == [{}, {}]
    assert {b.status for record in records for b in record.blocks} == {"accepted"}
    assert not any(b.ignored_arrays for record in records for b in record.blocks)
    start = exchanged(project)
    assert [*arrays] == [*start]
    assert moved(start, arrays) == {*start}
    plain = Project(make, exchange, blocks=False)
    fedavg, _, _ = run(plain, legacy=legacy, plain=True)
    for kind in ("train", "evaluate"):
        assert 0 < grid.sent_bytes[kind] <= fedavg.sent_bytes[kind]
    assert 0 < grid.received_bytes["train"] <= fedavg.received_bytes["train"]


@pytest.mark.parametrize("legacy", rest_slow([False, True]))
def test_own_metrics_are_aggregated_as_fedavg_does(legacy):
    project = Project(net, Whole())
    grid, records, _ = run(project, legacy=legacy, **_aggregated(legacy))
    metrics = _train_metrics(grid.result, legacy)
    # Node n says n, of 8 (n - 99) examples.
    assert [m["mine"] for m in metrics] == pytest.approx(
        [(100 * 1 + 101 * 2 + 102 * 3) / 6] * 2
    )
    losses = [
        np.average(
            [float(b.loss) for b in sorted(record.blocks, key=lambda b: b.device)],
            weights=[1, 2, 3],
        )
        for record in records
    ]
    assert [m["train_loss"] for m in metrics] == pytest.approx(losses)
    assert [m["round_s"] for m in metrics] == [record.round_s for record in records]


def _aggregated(legacy):
    def mean(metrics):
        total = sum(examples for examples, _ in metrics)
        names = metrics[0][1]
        return {k: sum(n * m[k] for n, m in metrics) / total for k in names}

    return {"fit_metrics_aggregation_fn": mean} if legacy else {}


def _train_metrics(result, legacy):
    if not legacy:
        return [*result.train_metrics_clientapp.values()]
    by_name = result.metrics_distributed_fit
    return [{n: by_name[n][i][1] for n in by_name} for i in range(2)]


@pytest.mark.slow
def test_a_custom_aggregation_of_train_metrics():
    seen = []

    def own(contents, weighted_by):
        seen.append(sorted(float(c["metrics"][weighted_by]) for c in contents))
        return MetricRecord({"worst": max(c["metrics"]["mine"] for c in contents)})

    project = Project(net, Whole())
    grid, _, _ = run(project, legacy=False, train_metrics_aggr_fn=own, rounds=1)
    assert seen == [[8, 16, 24]]
    assert grid.result.train_metrics_clientapp[1]["worst"] == 102


def test_metrics_of_a_device_whose_update_is_refused_are_not_believed():
    project = Project(net, Whole())
    strategy = LoLaDeft(net())
    grid = grid_of(project.app(), 3)

    def spoil(reply):
        if reply.metadata.message_type == "train" and reply.metadata.src_node_id == 102:
            reply.content["arrays"] = ArrayRecord({"x": Array(np.zeros(3))})
        return reply

    grid.alter = spoil
    result = strategy.start(grid, ArrayRecord(net().state_dict()), num_rounds=1)
    mine = result.train_metrics_clientapp[1]["mine"]
    assert mine == pytest.approx((100 + 2 * 101) / 3)


VALUES = {
    "fraction_train": 0.5,
    "fraction_fit": 0.5,
    "fraction_evaluate": 0.5,
    "min_train_nodes": 1,
    "min_fit_clients": 1,
    "min_evaluate_nodes": 1,
    "min_evaluate_clients": 1,
    "min_available_nodes": 2,
    "min_available_clients": 2,
    "weighted_by_key": "num-examples",
    "arrayrecord_key": "arrays",
    "configrecord_key": "config",
    "train_metrics_aggr_fn": aggregate_metricrecords,
    "evaluate_metrics_aggr_fn": aggregate_metricrecords,
    "evaluate_fn": lambda server_round, arrays, config: (1.0, {"n": len(arrays)}),
    "on_fit_config_fn": lambda server_round: {"lr": 0.1},
    "on_evaluate_config_fn": lambda server_round: {"batches": 1},
    "accept_failures": False,
    "initial_parameters": None,
    "fit_metrics_aggregation_fn": lambda metrics: {"count": len(metrics)},
    "evaluate_metrics_aggregation_fn": lambda metrics: {"count": len(metrics)},
    "inplace": False,
}


@pytest.mark.parametrize(
    ("legacy", "name"),
    rest_slow(
        [
            (legacy, name)
            for legacy, strategy in ((False, FedAvg), (True, LegacyFedAvg))
            for name in inspect.signature(strategy).parameters
        ],
        fast=0,
    ),
)
def test_every_argument_of_fedavg_is_taken(legacy, name):
    project = Project(net, Whole())
    _, records, _ = run(
        project, legacy=legacy, rounds=1, nodes=4, **{name: VALUES[name]}
    )
    assert [record.refused for record in records] == [{}]
    drawn = 2 if name in ("fraction_train", "fraction_fit") else 4
    assert [record.num_devices for record in records] == [drawn]


def test_all_of_fedavgs_arguments_at_once(caplog):
    """Positional, too, where FedAvg takes them so; what changes nothing is told."""
    parameters = inspect.signature(FedAvg).parameters
    assert {*parameters, *inspect.signature(LegacyFedAvg).parameters} == {*VALUES}
    strategy = LoLaDeft(net(), *(VALUES[name] for name in parameters))
    assert {name: getattr(strategy, name) for name in parameters} == {
        name: VALUES[name] for name in parameters
    }
    names = inspect.signature(LegacyFedAvg).parameters
    with caplog.at_level(logging.INFO, "flwr"):
        LegacyLoLaDeft(net(), **{name: VALUES[name] for name in names})
    said = [r.getMessage() for r in caplog.records if "no meaning" in r.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("inplace=False has no meaning here")
    for made in (LoLaDeft, LegacyLoLaDeft):
        with pytest.raises(TypeError, match="fraction_of"):
            made(net(), fraction_of=1)
    coordinator = coordinator_for_weights(net(), example=torch.ones(2, 3))
    with pytest.raises(UserError, match=r"batch_size: a coordinator has these already"):
        LoLaDeft(coordinator, batch_size=3)


@pytest.mark.slow
def test_drawn_devices_change_from_round_to_round_and_are_a_function_of_the_seed():
    def names(seed):
        project = Project(net, Whole())
        settings = replace(PROJECT_SETTINGS, seed=seed)
        _, records, _ = run(
            project,
            legacy=False,
            rounds=4,
            nodes=6,
            fraction_train=0.5,
            settings=settings,
        )
        return [tuple(sorted(b.device for b in r.blocks)) for r in records]

    first = names(1)
    assert {len(drawn) for drawn in first} == {3}
    assert len({*first}) > 1
    assert first == names(1) != names(2)


@pytest.mark.parametrize("strategy", [LoLaDeft, LegacyLoLaDeft])
def test_no_devices_a_block_are_refused_under_the_name_that_was_given(strategy):
    with pytest.raises(UserError, match=r"^devices_per_block=0 must be at least 1"):
        strategy(torch.nn.Linear(2, 2), devices_per_block=0)


def test_no_training_at_all():
    project = Project(net, Whole())
    strategy = LoLaDeft(net(), fraction_train=0.0)
    result, grid = run_message(project, strategy)
    assert grid.sent_bytes["train"] == 0
    assert [*result.evaluate_metrics_clientapp] == [1, 2]


def test_failures_that_are_not_accepted_leave_the_model(caplog):
    # Devices train side by side; taking the next number is one step.
    numbers = itertools.count()

    class Failing(Project):
        def trained(self, model, received):
            if next(numbers) == 0:
                raise ValueError("no data")
            return super().trained(model, received)

    project = Failing(net, Whole())
    strategy = LegacyLoLaDeft(
        net(), initial_parameters=initial(project), accept_failures=False
    )
    grid = grid_of(project.legacy_app(), 3)
    manager = SimpleClientManager()
    for node in grid.apps:
        manager.register(GridClientProxy(node, grid, 1))
    history, _ = Server(client_manager=manager, strategy=strategy).fit(2, None)
    rounds = [
        server_round for server_round, _ in history.metrics_distributed_fit["round_s"]
    ]
    assert rounds == [2]
    assert "round 1 is skipped: 1 devices failed" in caplog.text


@pytest.mark.parametrize("nodes", rest_slow([2, 1, 3, 7]))
def test_any_number_of_nodes_takes_part(nodes):
    """Each trains several of the three blocks, or several train each."""
    project = Project(net, Whole())
    options = {"min_available_nodes": 1, "min_train_nodes": 1, "devices_per_block": 1}
    _, records, _ = run(project, legacy=False, rounds=3, nodes=nodes, **options)
    assert {len(record.blocks) for record in records} == {nodes}
    for record in records:
        assert {n for b in record.blocks for n in b.blocks} == {0, 1, 2}


@pytest.mark.parametrize("legacy", rest_slow([False, True]))
@pytest.mark.parametrize("nodes", rest_slow([9, 2]))
def test_several_devices_return_each_block(nodes, legacy):
    """Where there are few each returns several, at last all of them, as under FedAvg.

    All devices of this project do the same.
    """
    project, plain = Project(net, Whole()), Project(net, Whole(), blocks=False)
    _, records, arrays = run(project, legacy=legacy, nodes=nodes)
    _, _, averaged = run(plain, legacy=legacy, nodes=nodes, plain=True)
    for record in records:
        counts = Counter(n for b in record.blocks for n in b.blocks)
        assert counts == dict.fromkeys(range(3), 2 if nodes == 2 else 6)
        assert {len(b.blocks) for b in record.blocks} == {3 if nodes == 2 else 2}
    for name, values in averaged.items():
        if name.endswith("num_batches_tracked"):  # FedAvg's mean of integers is another
            continue
        # Moves travel in fp16, each off by a part of 2**-11.
        np.testing.assert_allclose(arrays[name], values, rtol=1e-3, atol=1e-4)
