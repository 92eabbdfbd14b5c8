from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from lola_flwr.allocation import InfeasibleAllocation, RoundMode
from lola_flwr.errors import UserError
from lola_flwr.model.blocks import partition_parameters
from lola_flwr.planning import latency_target, statement
from lola_flwr.server.absences import Absence, Absences
from lola_flwr.server.selection import (
    BlockHistory,
    BoundedStaleness,
    LargestMoves,
    Lisa,
    OutlierWeighted,
    Progressive,
    RoundRobin,
    Selection,
    Trials,
    selector_named,
)
from lola_flwr.server.selection.importance import measure_importance
from lola_flwr.server.selection.outliers import outlier_ratios
from tests.server.coordinators import PARTITION, SHAPES, honest_reply, make_coordinator

IDS = ["id-0", "id-1", "id-2", "id-3"]
VALUES = {name: np.ones(SHAPES[name], np.float32) for name in PARTITION.trainable}


def weight(name):
    pytest.fail(f"only owlore looks at weights, such as {name}")


def blocks_of(plan):
    return sorted(a.block_index for a in plan.assignments.values())


def run_rounds(coordinator, ids, rounds):
    """Plan and complete rounds with honest devices; return the rounds' blocks."""
    chosen = []
    for server_round in range(1, rounds + 1):
        plan = coordinator.plan_round(server_round, ids)
        replies = [
            honest_reply(plan, device, value=1e-3) for device in plan.assignments
        ]
        record = coordinator.complete_round(plan, replies)
        assert record.refused == {}
        chosen.append(blocks_of(plan))
    return chosen


def test_fewer_devices_than_blocks_train_in_turns():
    coordinator = make_coordinator(
        num_devices=1, selection=Selection(RoundRobin(count=3))
    )
    assert run_rounds(coordinator, ["id-0"], 6) == [[2], [1], [0], [2], [1], [0]]


def test_blocks_that_need_two_devices_each_have_them():
    """Where devices are too few, each returns several, or with a choice fewer do."""
    mode = RoundMode(devices_per_block=2)

    def returned(*selection):
        some = {"selection": Selection(*selection)}
        coordinator = make_coordinator(num_devices=3, mode=mode, **some)
        assignments = coordinator.plan_round(1, IDS[:3]).assignments.values()
        blocks = [block for each in assignments for block in each.blocks]
        return [blocks.count(block) for block in range(3)]

    assert returned() == [2, 2, 2]
    assert returned(RoundRobin(count=2)) == [0, 0, 2]


def test_only_the_chosen_blocks_are_stepped():
    coordinator = make_coordinator(selection=Selection(RoundRobin(count=1)))
    run_rounds(coordinator, IDS, 1)
    moved = {
        n for n, v in coordinator.values().items() if not np.array_equal(v, VALUES[n])
    }
    assert moved == {*PARTITION.blocks[2], *PARTITION.head}


def test_a_latency_target_keeps_rounds_short_and_still_reaches_every_block():
    whole = [
        make_coordinator().plan_round(r, IDS).allocation.round_s for r in range(1, 13)
    ]
    target_s = 0.8 * float(np.median(whole))
    coordinator = make_coordinator(selection=Selection(latency_target_s=target_s))
    trained: set[int] = set()
    for server_round in range(1, 13):
        try:
            plan = coordinator.plan_round(server_round, IDS)
        except InfeasibleAllocation:
            continue
        assert plan.allocation.round_s <= target_s * (1 + 1e-9)
        trained.update(blocks_of(plan))
        coordinator.complete_round(
            plan, [honest_reply(plan, d) for d in plan.assignments]
        )
    assert trained == {0, 1, 2}


def test_a_choice_that_was_cut_short_is_in_the_round_s_record(monkeypatch):
    to_the_end, at_once = (
        partial(latency_target.choose_blocks, time_limit_s=limit_s)
        for limit_s in (60.0, 0.0)
    )
    longest_s = make_coordinator().plan_round(1, IDS).allocation.round_s
    gaps = []
    for choose in (to_the_end, at_once):
        monkeypatch.setattr(statement, "choose_blocks", choose)
        target = Selection(latency_target_s=0.9 * longest_s)
        coordinator = make_coordinator(selection=target)
        plan = coordinator.plan_round(1, IDS)
        replies = [honest_reply(plan, device) for device in plan.assignments]
        gaps.append(coordinator.complete_round(plan, replies).worth_gap)
    assert gaps[0] is None
    assert gaps[1] >= 0


def test_a_latency_target_does_not_count_on_devices_that_rest():
    """Devices that never answer are the fastest; rounds with the others are in time."""

    def fleet(**options):
        coordinator = make_coordinator(num_devices=0, **options)
        for index, speed in enumerate((1e6, 1e6, 1e8, 1e8)):
            stated = {"flops-per-s": speed, "memory-bytes": 1e9, "snr-db": 60.0}
            coordinator.add_device(f"id-{index}", {"name": f"d{index}", **stated})
        return coordinator

    alone = fleet(selection=Selection(RoundRobin(count=1)))
    target_s = 1.01 * alone.plan_round(1, IDS[:2]).allocation.round_s
    coordinator = fleet(selection=Selection(latency_target_s=target_s))
    asked = []
    for server_round in range(1, 9):
        plan = coordinator.plan_round(server_round, IDS)
        assert plan.allocation.round_s <= target_s * (1 + 1e-9)
        asked.append({"id-2", "id-3"} & set(plan.assignments))
        answers = [d for d in plan.assignments if d in IDS[:2]]
        coordinator.complete_round(plan, [honest_reply(plan, d) for d in answers])
    assert asked[0], "they are the best"
    assert not all(asked)


def test_where_nothing_else_is_in_time_those_that_rest_are_asked():
    coordinator = make_coordinator(
        num_devices=2, selection=Selection(latency_target_s=1e6)
    )
    for server_round in (1, 2, 3):
        plan = coordinator.plan_round(server_round, IDS[:2])
        assert plan.assignments
        coordinator.complete_round(plan, [])


def test_those_that_failed_least_are_asked_first():
    """Where no block can be trained without devices that rest."""
    coordinator = make_coordinator(
        num_devices=0, selection=Selection(RoundRobin(count=1))
    )
    for index, speed in enumerate((1e8, 1e6, 1e6)):
        stated = {"flops-per-s": speed, "memory-bytes": 1e9, "snr-db": 60.0}
        coordinator.add_device(f"id-{index}", {"name": f"d{index}", **stated})
    absences = {
        name: Absence(failures, until_round=100)
        for name, failures in (("d0", 6), ("d1", 1), ("d2", 2))
    }
    fleet = replace(coordinator.state.fleet, absences=Absences(absences))
    coordinator.state = replace(coordinator.state, fleet=fleet)
    assert [*coordinator.plan_round(5, IDS[:3]).assignments] == ["id-1"]


def test_what_a_selector_of_ones_own_may_choose():
    def choosing(*blocks):
        return make_coordinator(
            selection=Selection(lambda *_: blocks), mode=RoundMode(blocks=(1, 2))
        )

    assert blocks_of(choosing(0).plan_round(1, IDS)) == [1]
    assert blocks_of(choosing().plan_round(1, IDS)) == [1, 2], "none: all"
    with pytest.raises(UserError, match=r"chose \[2\] of 2 blocks"):
        choosing(2).plan_round(1, IDS)
    assert RoundRobin(count=np.int64(2)).count == 2


def test_a_latency_target_has_no_room_for_backups():
    with pytest.raises(UserError, match="backups=2 take band"):
        make_coordinator(
            selection=Selection(latency_target_s=9), mode=RoundMode(backups=2)
        )
    make_coordinator(selection=Selection(Lisa(count=1)), mode=RoundMode(backups=2))


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        (RoundRobin(count=1), [[2], [1], [2], [1], [2], [1]]),
        (LargestMoves(count=1), None),
        (Lisa(count=1, period=1), None),
        (OutlierWeighted(count=1, weights=(1e9, 1.0, 1.0), period=1), None),
        (Progressive(stage_rounds=3), [[2], [2], [2], [1, 2], [1, 2], [1, 2]]),
        (BoundedStaleness(Lisa(count=1, period=1), 2), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_selectors_choose_among_the_blocks_of_the_mode(selector, expected):
    coordinator = make_coordinator(
        selection=Selection(selector), mode=RoundMode(blocks=(1, 2))
    )
    chosen = run_rounds(coordinator, IDS, 6 if expected else 12)
    assert {block for blocks in chosen for block in blocks} == {1, 2}
    if expected is None:
        assert {len(blocks) for blocks in chosen} == {1}
    else:
        assert chosen == expected


def test_a_lost_update_does_not_count_as_training():
    coordinator = make_coordinator(selection=Selection(RoundRobin(count=1)))
    plan = coordinator.plan_round(1, IDS)
    coordinator.complete_round(plan, [])
    assert blocks_of(coordinator.plan_round(2, IDS)) == blocks_of(plan)


def test_relative_moves_are_measured():
    slim = selector_named(
        "slimfit", {"count": 1}, partition=PARTITION, weight_of=weight
    )
    coordinator = make_coordinator(selection=Selection(slim))
    chosen = []
    for server_round in range(1, 6):
        plan = coordinator.plan_round(server_round, IDS)
        (block,) = blocks_of(plan)
        # Block 1 moves three times as much as the others.
        value = 3e-2 if block == 1 else 1e-2
        replies = [honest_reply(plan, d, value=value) for d in plan.assignments]
        coordinator.complete_round(plan, replies)
        chosen.append(block)
    assert chosen == [2, 1, 0, 1, 1]


def test_importance_is_learned_from_the_response():
    # The loss depends on block 1's move alone; whoever damps it makes it worse.
    start = {name: np.zeros_like(v) for name, v in VALUES.items()}
    name = PARTITION.blocks[1][0]

    def response(values):
        return 1.0 - float(values[name].mean())

    history = BlockHistory.of(3)
    for number in range(20):
        history = measure_importance(
            history,
            PARTITION,
            start=start,
            values=VALUES,
            response=response,
            trials=Trials(damped_share=1 / 3),
            rng=np.random.default_rng(number),
        )
    assert history.importance[1] > 1 > history.importance[[0, 2]].max()


def test_damping_leaves_the_values_as_they_were():
    seen = []
    measure_importance(
        BlockHistory.of(3),
        PARTITION,
        start={name: np.zeros_like(v) for name, v in VALUES.items()},
        values=VALUES,
        response=lambda values: seen.append(values) or 0.5,
        trials=Trials(count=1, damped_share=1 / 3),
        rng=np.random.default_rng(0),
    )
    (damped,) = seen
    means = [{float(damped[n].mean()) for n in block} for block in PARTITION.blocks]
    assert sorted(map(tuple, means)) == [(0.25,), (1.0,), (1.0,)]
    assert all((values == 1).all() for values in VALUES.values())


def test_ist_in_a_run_measures_at_its_interval():
    calls = []
    coordinator = make_coordinator(
        selection=Selection(
            selector_named("ist", {"count": 1}, partition=PARTITION, weight_of=weight),
            trials=Trials(interval=2, count=3),
        ),
        response=lambda values: calls.append(1) or 0.5,
    )
    run_rounds(coordinator, IDS, 5)
    assert len(calls) == 2 * 3


def ist_coordinator(seen=None, **options):
    """Measures importance in every round; the loss is the mean of block 1's weights."""
    seen = [] if seen is None else seen

    def response(values):
        seen.append(float(values[PARTITION.blocks[1][0]].mean()))
        return seen[-1]

    selector = selector_named(
        "ist", {"count": 1}, partition=PARTITION, weight_of=weight
    )
    return make_coordinator(
        selection=Selection(selector, trials=Trials(interval=1, damped_share=1 / 3)),
        response=response,
        **options,
    )


def test_moves_are_measured_from_where_training_really_started():
    seen = []
    coordinator = ist_coordinator(seen)
    warm = {name: np.full_like(v, 5.0) for name, v in coordinator.arrays().items()}
    coordinator.start_from(warm)
    coordinator.plan_round(1, IDS)
    # Nothing has moved yet: damping leaves all as it is.
    assert set(seen) == {5.0}


def test_importance_goes_on_from_a_snapshot():
    warm = {n: np.full_like(v, 5.0) for n, v in ist_coordinator().arrays().items()}
    whole, first, second = (ist_coordinator() for _ in range(3))
    for coordinator in (whole, first):
        coordinator.start_from(warm)
    run_rounds(whole, IDS, 3)
    run_rounds(first, IDS, 3)
    second.restore(first.snapshot())
    for coordinator in (whole, second):
        plan = coordinator.plan_round(4, IDS)
        coordinator.complete_round(plan, [honest_reply(plan, d) for d in IDS[:1]])
    importance = [
        coordinator.snapshot().values["state"]["history"]["importance"]
        for coordinator in (whole, second)
    ]
    assert importance[0] == importance[1]
    assert np.ptp(importance[0]) > 1e-6


def test_outlier_ratio_counts_large_elements():
    names = ["layer.0.w", "layer.1.w", "layer.1.b"]
    partition = partition_parameters(
        ["layer.0.w", "layer.0.b", "layer.1.w", "layer.1.b"]
    )
    values = {name: np.ones((10, 10), np.float32) for name in partition.trainable}
    values["layer.1.w"][0, :3] = 100.0  # the mean is 3.97
    values |= {name: np.ones(10, np.float32) for name in names if name.endswith("b")}
    values["layer.0.b"] = np.ones(10, np.float32)
    assert outlier_ratios(values.__getitem__, partition) == (0.01, 0.03)
    # Fresh adapters have none: the layers count that they are in.
    base = replace(
        partition,
        blocks=(("layer.0.a",), ("layer.1.a",)),
        layers=(("layer.0.w", "layer.0.b"), ("layer.1.w", "layer.1.b")),
    )
    assert outlier_ratios(values.__getitem__, base) == (0.01, 0.03)


def test_selectors_by_name():
    def make(name, **options):
        return selector_named(name, options, partition=PARTITION, weight_of=weight)

    assert make("all") is None
    assert make("lisa", count=2, period=7) == Lisa(2, period=7)
    bounded = make("slimfit", count=1, max_staleness=9)
    assert bounded.max_rounds == 9
    with pytest.raises(UserError, match=r"Did you mean 'lisa'"):
        make("lissa", count=1)
    with pytest.raises(UserError, match=r"selector='lisa': .*size"):
        make("lisa", size=1)
    for options in ({"count": 2.5}, {"count": 1, "max_staleness": "x"}):
        with pytest.raises(UserError, match=r"=(2.5|'x') must be a whole number"):
            make("lisa", **options)
    with pytest.raises(UserError, match=r"takes no options"):
        make("all", count=1)


def test_a_selection_out_of_range():
    with pytest.raises(UserError, match=r"latency_target_s=0 s must be positive"):
        Selection(latency_target_s=0)
    with pytest.raises(UserError, match=r"value='age' is unknown"):
        Selection(value="age")
