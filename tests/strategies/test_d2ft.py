"""D2FT's strategy under Flower's own loop, with devices in this process."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideFixedClipping,
    Strategy,
)
from flwr.supercore.task_identity import TaskIdentity

from lola_flwr.build import MicroBatches, NormLimits, ServerStep, trainer_for
from lola_flwr.clients import BlockDevice, LoLaClient
from lola_flwr.d2ft.schedule import Budgets
from lola_flwr.d2ft.steps import StepSchedules
from lola_flwr.d2ft.subnetworks import LayerNotUnderstood
from lola_flwr.errors import UserError
from lola_flwr.model.blocks import partition_parameters
from lola_flwr.server.spread.exchange import PartFailed
from lola_flwr.strategies import Waits
from lola_flwr.strategies.d2ft import D2FT
from lola_flwr.system.devices import DeviceProfile, simulated_device
from lola_flwr.wire.records import REPORT_KEY
from tests.d2ft.cases import make
from tests.flat_settings import with_fields
from tests.strategies.in_process import InProcessGrid

# Inputs, two branches of three layers, losses, and the branches back.
EXCHANGES = 1 + 6 + 1 + 6


@pytest.fixture(autouse=True)
def task(monkeypatch):
    """Flower makes messages only within a task."""
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def profile_of(index, equal):
    if equal:
        return DeviceProfile(f"d{index}", 1e9, 1e9, 10.0)
    return simulated_device(index, seed=2)


def federation(
    family="roberta",
    num_devices=3,
    equal=False,
    schedules=None,
    trainer_options=None,
    **options,
):
    """A strategy and its grid of devices, each of which has a model of its own."""
    case = make(family)
    options_left = dict(trainer_options or {})
    trainer = trainer_for(
        case.model,
        case.partition,
        micro_batches=MicroBatches(micro_batch_size=2),
        schedules=StepSchedules(
            **{"micro_batches": 3, "audit_share": 0.0, **(schedules or {})}
        ),
        step=with_fields(ServerStep(lr=2e-3), options_left),
        **options_left,
    )

    def make_app(index):
        model = copy.deepcopy(make(family).model)

        def draw(number, size):
            rows = [(number * size + i) % 6 for i in range(size)]
            return {name: tensor[rows] for name, tensor in case.batch.items()}

        return LoLaClient(
            lambda _: BlockDevice(
                profile=profile_of(index, equal),
                load_model=lambda: (model, case.partition),
                batch_source=draw,
            )
        )

    grid = InProcessGrid({100 + i: make_app(i) for i in range(num_devices)})
    return D2FT(trainer, **options), grid


def run(strategy, grid, num_rounds=1, **options):
    return strategy.start(grid, strategy.initial_arrays(), num_rounds, **options)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["roberta", "roberta-lora", "vit"])
def test_steps_lower_the_loss(family):
    records = []
    strategy, grid = federation(family, on_round=records.append)
    result = run(strategy, grid, 12)
    assert isinstance(strategy, Strategy)
    assert [r.server_round for r in records] == list(range(1, 13))
    assert [r.skipped for r in records] == 12 * [None]
    assert {r.exchanges for r in records} == {EXCHANGES}
    losses = [m["train_loss"] for m in result.train_metrics_clientapp.values()]
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.01
    for name, values in strategy.trainer.values().items():
        np.testing.assert_array_equal(result.arrays[name].numpy(), values)
    first = records[0].lines()
    assert len(first) == 1
    assert first[0].startswith("step 1: latency ")
    assert f"3 devices, {EXCHANGES} exchanges" in first[0]
    wireless_s = [r.wireless_s for r in records]
    np.testing.assert_allclose(np.cumsum([r.round_s for r in records]), wireless_s)


def uploads(schedules):
    """Bytes of activations, and of gradients of such, that devices send."""
    records, received = [], Counter()
    strategy, grid = federation(
        num_devices=4, equal=True, schedules=schedules, on_round=records.append
    )

    def count(reply):
        if reply.content.array_records:
            arrays = [
                a for r in reply.content.array_records.values() for a in r.items()
            ]
            kind = reply.content[REPORT_KEY]["kind"]
            received[kind] += sum(
                len(array.data) for name, array in arrays if name != "gradients"
            )
        return reply

    grid.alter = count
    run(strategy, grid, 4)
    assert [r.skipped for r in records] == 4 * [None]
    return received["forward"] + received["backward"]


@pytest.mark.slow
def test_half_of_the_traffic_is_half_of_the_activations():
    all_of_it = uploads({"micro_batches": 6})
    half = uploads({"micro_batches": 6, "budgets": Budgets(traffic=0.5)})
    assert half == pytest.approx(all_of_it / 2, rel=0.02)


@pytest.mark.slow
def test_every_device_s_data_is_used():
    """Also where half of the micro-batches are left out, and as many as devices."""
    strategy, grid = federation(
        num_devices=4,
        schedules={"micro_batches": 4, "budgets": Budgets(traffic=0.5)},
    )
    run(strategy, grid, 8)
    tasks = [m for m in grid.sent if m.metadata.message_type == "train.lola_part"]
    owners = Counter(
        m.metadata.dst_node_id for m in tasks if m.content["config"]["kind"] == "inputs"
    )
    assert owners.keys() == {100, 101, 102, 103}
    assert owners.total() == 16
    numbers = [m.content["config"]["numbers"] for m in tasks]
    drawn = {n for text in numbers for n in text.split()}
    assert len(drawn) == 16, "no micro-batch is drawn twice"


def test_a_device_that_fails_costs_one_step_and_then_rests():
    records = []
    strategy, grid = federation(on_round=records.append)

    def fail(reply):
        if reply.metadata.src_node_id != 101 or not reply.content.array_records:
            return reply
        return Message(Error(code=0, reason="out of battery"), reply_to=reply)

    grid.alter = fail
    before = {n: v.copy() for n, v in strategy.trainer.values().items()}
    run(strategy, grid, 1)
    assert records[0].lines()[0].startswith("round 1 is skipped: device 101: no reply")
    for name, values in strategy.trainer.values().items():
        np.testing.assert_array_equal(values, before[name])
    grid.sent.clear()
    run(strategy, grid, 2)
    assert records[-1].skipped is None
    assert {m.metadata.dst_node_id for m in grid.sent} == {100, 102}


def test_all_that_do_not_answer_rest_together():
    records = []
    strategy, grid = federation(num_devices=4, on_round=records.append)

    def fail(reply):
        if reply.metadata.src_node_id < 102 or not reply.content.array_records:
            return reply
        return Message(Error(code=0, reason="out of battery"), reply_to=reply)

    grid.alter = fail
    strategy.trainer._schedules = replace(strategy.trainer._schedules, micro_batches=4)
    run(strategy, grid, 1)
    assert "device 102: no reply" in records[0].skipped
    assert "device 103: no reply" in records[0].skipped


def test_a_step_s_gradient_is_held_to_a_norm():
    moves = []
    for limit in (1e-3, 1e-4):
        case_options = {"limits": NormLimits(limit), "optimizer": "SGD"}
        strategy, grid = federation(trainer_options=case_options)
        before = {n: v.copy() for n, v in strategy.trainer.values().items()}
        run(strategy, grid, 1)
        after = strategy.trainer.values()
        squares = [np.square(after[n] - v).sum() for n, v in before.items()]
        moves.append(np.sqrt(sum(squares)))
    np.testing.assert_allclose(moves, [2e-6, 2e-7], rtol=1e-2)  # the rate is 2e-3


def test_layers_that_do_not_follow_each_other_are_refused():
    case = make("roberta")
    names = [name for name, _ in case.model.named_parameters()]
    gap = partition_parameters(
        names, blocks=["roberta.encoder.layer.0", "roberta.encoder.layer.2"]
    )
    with pytest.raises(LayerNotUnderstood, match=r"layers \[0, 2\]"):
        trainer_for(case.model, gap, schedules=StepSchedules())


@pytest.mark.parametrize(
    "wrapper",
    [
        DifferentialPrivacyServerSideFixedClipping,
        DifferentialPrivacyClientSideFixedClipping,
    ],
)
def test_wrappers_that_clip_updates_are_refused(wrapper):
    strategy, grid = federation()
    with pytest.raises(UserError, match=f"{wrapper.__name__} clips"):
        wrapper(strategy, 0.1, 1.0, 3).start(grid, strategy.initial_arrays(), 1)


class Noisy(Strategy):
    """A wrapper with a start of its own, as Flower's are."""

    def __init__(self, inner):
        self.inner = inner

    def summary(self):
        self.inner.summary()

    def configure_train(self, *args):
        return self.inner.configure_train(*args)

    def configure_evaluate(self, *args):
        return self.inner.configure_evaluate(*args)

    def aggregate_evaluate(self, *args):
        return self.inner.aggregate_evaluate(*args)

    def aggregate_train(self, server_round, replies):
        arrays, metrics = self.inner.aggregate_train(server_round, replies)
        noisy = {
            name: Array(a.numpy() + np.float32(0.05)) for name, a in arrays.items()
        }
        return ArrayRecord(noisy), metrics


def test_rounds_under_a_wrapper_are_reported_and_go_on_from_its_values():
    records = []
    strategy, grid = federation(on_round=records.append)
    before = strategy.trainer.values()["classifier.out_proj.bias"].copy()
    Noisy(strategy).start(grid, strategy.initial_arrays(), 3)
    assert [record.server_round for record in records] == [1, 2, 3]
    after = strategy.trainer.values()["classifier.out_proj.bias"]
    np.testing.assert_allclose(after - before, 0.1, atol=0.02)


@pytest.mark.slow
def test_a_later_step_without_devices_is_skipped():
    records = []
    strategy, grid = federation(
        waits=Waits(devices_s=0.2),
        on_round=lambda record: (records.append(record), grid.apps.clear()),
    )
    run(strategy, grid, 2)
    assert records[0].skipped is None
    assert records[-1].skipped.startswith("0 devices are connected")
    assert records[-1].wireless_s == records[0].wireless_s


@pytest.mark.parametrize(
    ("kind", "name", "value", "named"),
    [
        pytest.param("inputs", "hidden", 9e3, False, marks=pytest.mark.slow),
        ("inputs", "hidden", 9e4, True),
        pytest.param("forward", "hidden", 9e3, False, marks=pytest.mark.slow),
        pytest.param("forward", "hidden", 9e5, True, marks=pytest.mark.slow),
        pytest.param("backward", "slopes", 9e5, True, marks=pytest.mark.slow),
        ("backward", "squares", 3e38, True),
        ("backward", "magnitudes", 3e38, True),
        ("loss", "slopes", 9e3, False),
        pytest.param("loss", "gradients", 9e5, False, marks=pytest.mark.slow),
    ],
)
def test_finite_lies_are_their_sender_s_fault(kind, name, value, named):
    """Nobody else rests for them, and no parameter becomes NaN."""
    records = []
    strategy, grid = federation(on_round=records.append)
    signs = np.random.default_rng(1)
    lies = []

    def lie(reply):
        arrays = reply.content.array_records.get("arrays", {})
        report = reply.content.config_records.get(REPORT_KEY, {})
        if reply.metadata.src_node_id != 101 or report.get("kind") != kind:
            return reply
        if report.get(name):
            report[name] = np.full(len(report[name]) // 8, value).tobytes()
            lies.append(name)
        if name in arrays:
            size = arrays[name].numpy().size
            lied = value * signs.choice([-1, 1], size).astype(np.float32)
            arrays[name] = Array(lied)
            lies.append(name)
        return reply

    grid.alter = lie
    run(strategy, grid, 3)
    assert lies
    skipped = [record.skipped for record in records if record.skipped]
    assert all(reason.startswith("device 101: ") for reason in skipped)
    assert bool(skipped) == named
    for values in strategy.trainer.values().values():
        assert np.isfinite(values).all()


def test_where_nobody_knows_whose_fault_it_is_one_rests_by_lot(monkeypatch):
    records = []
    strategy, grid = federation(on_round=records.append)

    def fail(*_, **__):
        raise PartFailed({}, "the gradient became infinite")

    with monkeypatch.context() as patched:
        patched.setattr("lola_flwr.server.spread.trainer.spread_gradient", fail)
        run(strategy, grid, 1)
    assert records[0].skipped == "the gradient became infinite"
    assert len(strategy.trainer.state.fleet.absences.of_device) == 1


@pytest.mark.parametrize("kind", ["no report", "nonsense", "no arrays"])
def test_a_hostile_device_changes_nothing(kind):
    records = []
    strategy, grid = federation(on_round=records.append)

    def spoil(reply):
        if reply.metadata.src_node_id == 101 and reply.content.array_records:
            if kind == "no report":
                del reply.content[REPORT_KEY]
            elif kind == "nonsense":
                reply.content[REPORT_KEY] = ConfigRecord({"kind": 3.0})
            else:
                reply.content["arrays"] = ArrayRecord({})
        return reply

    grid.alter = spoil
    before = {n: v.copy() for n, v in strategy.trainer.values().items()}
    run(strategy, grid, 1)
    assert records[0].skipped.startswith("device 101: ")
    assert records[0].exchanges > 0
    assert records[0].received_bytes > 0
    for name, values in strategy.trainer.values().items():
        np.testing.assert_array_equal(values, before[name])


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True])
def test_a_run_goes_on_where_it_stopped(shared):
    options = {
        "budgets": Budgets(traffic=0.5),
        "shared_budgets": shared,
        "micro_batches": 4,
    }
    whole, grid = federation(schedules=options)
    run(whole, grid, 4)
    first, grid = federation(schedules=options)
    run(first, grid, 2)
    snapshot = first.trainer.snapshot()
    second, grid = federation(schedules=options)
    second.trainer.restore(copy.deepcopy(snapshot))
    run(second, grid, 4)
    assert second.trainer.server_round == 4
    for name, values in whole.trainer.values().items():
        np.testing.assert_array_equal(second.trainer.values()[name], values)
    other, _ = federation("roberta-lora", schedules=options)
    with pytest.raises(UserError, match="other frozen weights"):
        other.trainer.restore(snapshot)


@pytest.mark.slow
def test_a_node_that_tells_no_profile_is_not_waited_for_every_time():
    strategy, grid = federation()
    grid.apps[999] = grid.apps[100]
    deliver = grid.send_and_receive
    grid.send_and_receive = lambda messages, **options: [
        reply
        for reply in deliver(messages, **options)
        if reply.metadata.src_node_id != 999
    ]
    run(strategy, grid, 6)
    asked = [
        int(m.metadata.group_id)
        for m in grid.sent
        if m.metadata.dst_node_id == 999 and "query" in m.metadata.message_type
    ]
    assert asked == [1, 3, 6]


def test_evaluations_are_part_of_the_records():
    records = []
    strategy, grid = federation(on_round=records.append)
    result = run(
        strategy,
        grid,
        2,
        evaluate_fn=lambda step, arrays: MetricRecord({"accuracy": step / 10}),
    )
    assert [r.metrics for r in records] == [{"accuracy": 0.1}, {"accuracy": 0.2}]
    assert [r.start_metrics for r in records] == [{"accuracy": 0.0}, {}]
    assert result.evaluate_metrics_serverapp[2]["accuracy"] == 0.2


@pytest.mark.slow
def test_devices_return_what_they_hold_when_it_is_looked_at():
    seen, records = [], []
    strategy, grid = federation(evaluate_every=2, on_round=records.append)

    def evaluate(step, arrays):
        returned = sum(m.content["config"]["kind"] == "return" for m in parts(grid))
        array = next(iter(arrays.values()))
        seen.append((step, returned, array.numpy().copy()))
        return MetricRecord({"accuracy": 0.5})

    result = run(strategy, grid, 5, evaluate_fn=evaluate)
    steps, returned, values = zip(*seen, strict=True)
    assert steps == (0, 2, 4, 5)
    assert returned[0] == 0
    assert np.diff(returned).all()
    for one, other in pairwise(values):
        assert not np.array_equal(one, other)
    assert [r.server_round for r in records if r.metrics] == [2, 4, 5]
    # What was returned for an evaluation is on the next record.
    assert [r.server_round for r in records if r.exchanges > EXCHANGES] == [3, 5]
    for name, array in strategy.trainer.values().items():
        np.testing.assert_array_equal(result.arrays[name].numpy(), array)


def parts(grid):
    return [m for m in grid.sent if m.metadata.message_type == "train.lola_part"]


def test_errors_come_before_the_first_step():
    strategy, grid = federation(num_devices=1, waits=Waits(devices_s=0.2))
    with pytest.raises(UserError, match="1 devices are connected"):
        run(strategy, grid)
    strategy, grid = federation()
    arrays = strategy.initial_arrays()
    del arrays[next(iter(arrays))]
    with pytest.raises(UserError, match="Initial arrays"):
        strategy.start(grid, arrays, 1)
    strategy, grid = federation(
        schedules={"budgets": Budgets(compute=0.01)}, min_available_nodes=2
    )
    with pytest.raises(UserError, match="raise the budgets"):
        run(strategy, grid)
