"""The Message API strategy under Flower's own loop, with devices in this process."""

from __future__ import annotations

import copy
from collections import Counter

import numpy as np
import pytest
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import Strategy
from flwr.supercore.task_identity import TaskIdentity

from lola_flwr.clients import BlockDevice, LoLaClient
from lola_flwr.costs.estimated import estimate_costs
from lola_flwr.costs.of_model import zeroth_order_costs
from lola_flwr.errors import UserError
from lola_flwr.model.blocks import partition_parameters
from lola_flwr.model.loading import fingerprint
from lola_flwr.strategies import Waits
from lola_flwr.strategies.message import LoLaDeft
from lola_flwr.system.devices import simulated_device
from lola_flwr.wire.packing import received_values
from lola_flwr.wire.records import PROFILE_KEY, REPORT_KEY, UpdateReport
from lola_flwr.zeroth_order.directions import MAX_DIRECTIONS
from lola_flwr.zeroth_order.mixing import ZerothOrder
from tests.flat_settings import coordinator_of
from tests.strategies.in_process import InProcessGrid, message_bytes


@pytest.fixture(autouse=True)
def task(monkeypatch):
    """Flower makes messages only within a task."""
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.fixture
def federation(roberta, batch):
    """Return a function that makes a strategy and its grid of devices."""

    def make(num_devices=4, num_directions=None, **options):
        model = copy.deepcopy(roberta)
        parameters = dict(model.named_parameters())
        partition = partition_parameters(parameters)
        shapes = {name: tuple(p.shape) for name, p in parameters.items()}
        values = {n: parameters[n].numpy(force=True) for n in partition.trainable}
        sizes = {"batch_size": 6, "sequence_length": 10}
        zeroth_order = num_directions and ZerothOrder(
            costs=zeroth_order_costs(
                model, partition, **sizes, num_directions=num_directions
            ),
            use="always",
            lr=0.5,
            num_directions=num_directions,
        )
        coordinator = coordinator_of(
            partition,
            values,
            estimate_costs(shapes, partition, **sizes),
            bandwidth_hz=1e6,
            lr=1e-2,
            base_fingerprint=fingerprint(model, partition.frozen),
            batch_size=6,
            zeroth_order=zeroth_order,
        )

        def device_fn(context):
            return BlockDevice(
                profile=simulated_device(context.node_id - 100, seed=2),
                load_model=lambda: (model, partition),
                batch_source=lambda _, size: {k: v[:size] for k, v in batch.items()},
            )

        def make_app():
            app = LoLaClient(device_fn)

            @app.evaluate()
            def evaluate(message, context):
                metrics = {"num-examples": 2, "accuracy": context.node_id - 100.0}
                return Message(
                    RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message
                )

            return app

        grid = InProcessGrid({100 + index: make_app() for index in range(num_devices)})
        return LoLaDeft(coordinator, **options), grid

    return make


def run(strategy, grid, num_rounds=1, **options):
    return strategy.start(grid, strategy.initial_arrays(), num_rounds, **options)


def train_messages(grid):
    return [m for m in grid.sent if m.metadata.message_type == "train"]


def test_what_devices_are_sent_alike_is_one_array(federation):
    """Flower hashes each array that it is given: a copy for each device, each copy."""
    strategy, grid = federation(fraction_evaluate=1.0)
    run(strategy, grid)
    for message_type in ("train", "evaluate"):
        records = [
            message.content["arrays"]
            for message in grid.sent
            if message.metadata.message_type == message_type
        ]
        assert len(records) > 1
        for name, array in records[0].items():
            assert all(record[name] is array for record in records)


def test_rounds_lower_the_loss_and_cost_one_message_each(federation):
    records = []
    strategy, grid = federation(on_round=records.append)
    result = run(strategy, grid, 12)
    assert isinstance(strategy, Strategy)
    assert Counter(m.metadata.message_type for m in grid.sent) == {
        "query.lola_profile": 4,
        "train": 36,
    }
    assert grid.batches[0] == {"query.lola_profile": 4}, "all profiles in one batch"
    losses = [m["train_loss"] for m in result.train_metrics_clientapp.values()]
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.05
    assert [record.server_round for record in records] == list(range(1, 13))
    assert {b.status for record in records for b in record.blocks} == {"accepted"}
    for name, values in strategy.coordinator.values().items():
        np.testing.assert_array_equal(result.arrays[name].numpy(), values)


@pytest.mark.slow
def test_a_round_without_back_propagation_uploads_less_than_1_kb(federation):
    records = []
    strategy, grid = federation(num_directions=MAX_DIRECTIONS, on_round=records.append)
    sizes = []

    def measured(reply):
        if reply.metadata.message_type == "train":
            sizes.append(message_bytes(reply))
        return reply

    grid.alter = measured
    result = run(strategy, grid, 6)
    assert [b.status for record in records for b in record.blocks] == 18 * ["accepted"]
    assert len(sizes) == 18
    assert max(sizes) < 1000
    losses = [m["train_loss"] for m in result.train_metrics_clientapp.values()]
    assert losses[-1] < losses[0] - 0.003


def test_messages_have_their_own_configuration_and_their_round(federation):
    strategy, grid = federation()
    config = ConfigRecord({"temperature": 0.1, "share": 7.0})
    run(strategy, grid, 2, train_config=config)
    messages = train_messages(grid)
    assert [m.metadata.group_id for m in messages] == ["1"] * 3 + ["2"] * 3
    configs = [m.content["config"] for m in messages]
    assert len({id(config) for config in configs}) == 6
    assert all(config["temperature"] == 0.1 for config in configs)
    assert all(config["share"] == 7.0 for config in configs), "theirs stay"
    assert all(config["lola-share"] <= 1 for config in configs)
    assert sorted(config["block-index"] for config in configs[:3]) == [0, 1, 2]
    assert dict(config) == {"temperature": 0.1, "share": 7.0}


def spoiled(reply, kind):
    """Return what a faulty or hostile device sends instead."""
    content = reply.content
    if kind == "no records":
        content = RecordDict()
    elif kind == "two array records":
        content["more"] = ArrayRecord([np.zeros(3)])
    elif kind == "bytes":
        name = next(iter(content["arrays"]))
        content["arrays"][name] = Array("float32", (1,), "numpy.ndarray", b"x")
    elif kind == "list of examples":
        content["metrics"] = MetricRecord({"num-examples": [1, 2]})
    elif kind == "no examples":
        content["metrics"] = MetricRecord({"loss": 1.0})
    elif kind == "odd report":
        content[REPORT_KEY] = ConfigRecord({"update-kind": [1.0], "loss": b""})
    return Message(content, reply_to=train_message_of(reply))


def values_sent(message, arrays):
    """Return the values that a message holds, which are those of all these arrays."""
    received = {n: a.numpy() for n, a in message.content["arrays"].items()}
    shapes = {name: array.numpy().shape for name, array in arrays.items()}
    return received_values(received, shapes)


def train_message_of(reply):
    ask = Message(
        RecordDict(), dst_node_id=reply.metadata.src_node_id, message_type="train"
    )
    ask.metadata.__dict__["_message_id"] = reply.metadata.reply_to_message_id
    return ask


@pytest.mark.parametrize(
    "kind",
    [
        "no records",
        "two array records",
        "bytes",
        "list of examples",
        "no examples",
        "odd report",
    ],
)
def test_a_bad_reply_is_refused_and_costs_its_block_only(federation, kind):
    records = []
    strategy, grid = federation(num_devices=3, on_round=records.append)
    before = {k: v.copy() for k, v in strategy.coordinator.values().items()}

    def alter(reply):
        is_bad = reply.metadata.message_type == "train" and (
            reply.metadata.src_node_id == 101
        )
        return spoiled(reply, kind) if is_bad else reply

    grid.alter = alter
    run(strategy, grid)
    (record,) = records
    assert sum(record.refused.values()) == 1
    lost = next(b for b in record.blocks if b.device == "device-0001")
    assert lost.status not in ("accepted", "no reply")
    after = strategy.coordinator.values()
    for index, names in enumerate(strategy.coordinator.partition.blocks):
        changed = any(not np.array_equal(before[n], after[n]) for n in names)
        assert changed == (index != lost.block_index)


def test_a_failing_device_costs_its_block_only(federation):
    records = []
    strategy, grid = federation(num_devices=3, on_round=records.append)
    app = grid.apps[102]

    def failing(message, context):
        if message.metadata.message_type == "train":
            raise ValueError("out of memory")
        return app(message, context)

    grid.apps[102] = failing
    run(strategy, grid)
    statuses = sorted(block.status for block in records[0].blocks)
    assert statuses == ["accepted", "accepted", "no reply"]


def test_a_device_without_a_profile_is_left_out_and_asked_again(federation):
    strategy, grid = federation()
    grid.apps[100] = ClientApp()
    run(strategy, grid, 2)
    to_100 = [
        m.metadata.message_type for m in grid.sent if m.metadata.dst_node_id == 100
    ]
    assert to_100 == ["query.lola_profile"] * 2


def test_a_profile_that_lies_is_left_out(federation, caplog):
    strategy, grid = federation()

    def alter(reply):
        if reply.metadata.src_node_id == 100:
            lie = {"name": "x", "flops-per-s": float("inf")}
            reply.content[PROFILE_KEY] = ConfigRecord(lie)
        return reply

    grid.alter = alter
    run(strategy, grid)
    assert 100 not in {m.metadata.dst_node_id for m in train_messages(grid)}
    (said,) = [r for r in caplog.records if "is left out" in r.msg]
    # An exception knows its frames and these the model: who keeps log records, as
    # this test does, must not keep models.
    assert {type(argument) for argument in said.args} == {str}


def test_too_few_devices_end_the_run_with_what_to_do(federation):
    strategy, grid = federation(
        num_devices=2, min_available_nodes=3, waits=Waits(devices_s=0.2)
    )
    with pytest.raises(UserError, match=r"2 devices are connected after 0.2 s; 3 are"):
        run(strategy, grid)


def test_later_rounds_go_on_with_who_is_there_and_are_skipped_without_anybody(
    federation,
):
    records = []
    strategy, grid = federation(num_devices=3, waits=Waits(devices_s=0.2))
    everybody = dict(grid.apps)

    def leave_and_come_back(record):
        records.append(record)
        there = {1: [100, 101], 2: [], 3: [100, 101, 102]}.get(record.server_round, [])
        grid.apps = {node: everybody[node] for node in there}

    strategy._rounds.on_round = leave_and_come_back
    result = run(strategy, grid, 4)
    assert [record.skipped is None for record in records] == [True, True, False, True]
    assert [len(record.blocks) for record in records] == [3, 2, 0, 3]
    assert sorted(result.train_metrics_clientapp) == [1, 2, 4]


def test_evaluation_belongs_to_the_round(federation):
    records = []
    strategy, grid = federation(on_round=records.append)
    run(
        strategy,
        grid,
        2,
        evaluate_fn=lambda server_round, arrays: (
            MetricRecord({"loss": 0.25, "accuracy": 0.5, "curve": [1.0]})
            if server_round in (0, 2)
            else None
        ),
    )
    assert records[0].metrics == {}
    assert records[1].metrics == {"loss": 0.25, "accuracy": 0.5}
    # What the run started from has no record of its own.
    assert records[0].start_metrics == {"loss": 0.25, "accuracy": 0.5}
    assert records[1].start_metrics == {}
    assert all(record.measured_round_s > 0 for record in records)


def evaluating_nodes(grid):
    return [
        m.metadata.dst_node_id
        for m in grid.sent
        if m.metadata.message_type == "evaluate"
    ]


def test_devices_that_evaluate_are_drawn_from_the_seed(federation):
    drawn = []
    for _ in range(2):
        strategy, grid = federation(
            num_devices=8, fraction_evaluate=0.5, min_evaluate_nodes=1
        )
        result = run(strategy, grid, 3)
        drawn.append(evaluating_nodes(grid))
        assert set(result.evaluate_metrics_clientapp) == {1, 2, 3}
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 12
    assert len({tuple(drawn[0][i : i + 4]) for i in (0, 4, 8)}) > 1


def test_odd_evaluations_are_left_out(federation):
    strategy, grid = federation(num_devices=6, fraction_evaluate=1.0)
    odd = {
        100: MetricRecord({"num-examples": 2, "accuracy": float("nan")}),
        101: MetricRecord({"num-examples": 2, "other": 1.0}),
        102: MetricRecord({"num-examples": -2, "accuracy": 1.0}),
    }

    def alter(reply):
        node = reply.metadata.src_node_id
        if reply.metadata.message_type == "evaluate" and node in odd:
            reply.content["metrics"] = odd[node]
        return reply

    grid.alter = alter
    result = run(strategy, grid)
    # The mean of what nodes 103, 104 and 105 report, with equal weights.
    assert result.evaluate_metrics_clientapp[1]["accuracy"] == pytest.approx(4.0)


def test_claims_of_examples_are_capped(federation):
    strategy, grid = federation(num_devices=4, fraction_evaluate=1.0)

    def alter(reply):
        if reply.metadata.src_node_id == 103 and "metrics" in reply.content:
            reply.content["metrics"]["num-examples"] = 10**15
        return reply

    grid.alter = alter
    result = run(strategy, grid)
    # Nodes 100, 101 and 102 weigh 2 each, and 103 weighs 20.
    expected = (2 * (0 + 1 + 2) + 20 * 3) / 26
    accuracy = result.evaluate_metrics_clientapp[1]["accuracy"]
    assert accuracy == pytest.approx(expected)


def test_a_strategy_can_be_started_again(federation):
    records = []
    strategy, grid = federation(on_round=records.append)
    initial = strategy.initial_arrays()
    first = run(strategy, grid, 2)
    again = strategy.start(grid, first.arrays, 2)
    assert [record.server_round for record in records] == [1, 2, 1, 2]
    assert records[2].wireless_s > records[1].wireless_s
    # From the first arrays once more, and not from where the second run ended.
    strategy.start(grid, initial, 1)
    sent = values_sent(train_messages(grid)[-1], initial)
    for name, values in sent.items():
        np.testing.assert_array_equal(values, initial[name].numpy())
    name = strategy.coordinator.partition.blocks[0][0]
    assert not np.array_equal(again.arrays[name].numpy(), first.arrays[name].numpy())
    # Arrays of another model are refused as in the first run.
    with pytest.raises(UserError, match="pass the arrays of the model"):
        strategy.start(grid, ArrayRecord([np.zeros(3)]), 1)


def test_arrays_of_another_model_are_refused(federation):
    strategy, grid = federation()
    arrays = strategy.initial_arrays()
    name = next(iter(arrays))
    shorter = ArrayRecord({k: v for k, v in arrays.items() if k != name})
    with pytest.raises(UserError, match=f"{name} is missing"):
        strategy.start(grid, shorter)


def test_initial_values_are_those_given(federation):
    strategy, grid = federation()
    arrays = {
        name: Array(np.zeros_like(array.numpy()))
        for name, array in strategy.initial_arrays().items()
    }
    strategy.start(grid, ArrayRecord(arrays), 1)
    for message in train_messages(grid):
        assert not any(a.numpy().any() for a in message.content["arrays"].values())


def test_what_a_wrapper_changes_is_what_goes_on(federation):
    class Halving(Strategy):
        def __init__(self, inner):
            self.inner = inner

        def aggregate_train(self, server_round, replies):
            arrays, metrics = self.inner.aggregate_train(server_round, replies)
            halves = {k: Array(v.numpy() / 2) for k, v in arrays.items()}
            return ArrayRecord(halves), metrics

        def configure_train(self, *arguments):
            return self.inner.configure_train(*arguments)

        def configure_evaluate(self, *arguments):
            return self.inner.configure_evaluate(*arguments)

        def aggregate_evaluate(self, *arguments):
            return self.inner.aggregate_evaluate(*arguments)

        def summary(self):
            pass

    records = []
    strategy, grid = federation(on_round=records.append)
    result = Halving(strategy).start(grid, strategy.initial_arrays(), 2)
    final = result.arrays
    sent = values_sent(train_messages(grid)[-1], final)
    assert len(records) == 2
    # AdamW moves a value by about lr=0.01; then it is halved.
    for name, array in final.items():
        np.testing.assert_allclose(
            array.numpy(), sent[name] / 2, atol=0.5 * 0.0101 + 1e-6
        )


def test_the_report_is_read_from_its_record(federation):
    strategy, grid = federation()
    seen = []

    def alter(reply):
        if reply.metadata.message_type == "train":
            seen.append(UpdateReport.from_record(reply.content[REPORT_KEY]))
        return reply

    grid.alter = alter
    run(strategy, grid)
    assert sorted(report.block_index for report in seen) == [0, 1, 2]
    assert {report.update_kind for report in seen} == {"gradient"}
