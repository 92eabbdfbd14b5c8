"""What a round's replies come to, whoever sent them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lola_flwr.server.norm_limits import NormHistory, NormLimits
from lola_flwr.server.replies import UpdateReader
from lola_flwr.server.round.intake import read_replies
from lola_flwr.wire.versions import Manifest, Piece
from tests.server.coordinators import (
    PARTITION,
    SHAPES,
    honest_reply,
    make_coordinator,
    npy,
    size_of,
)

SENT = {name: np.ones(SHAPES[name], np.float32) for name in PARTITION.trainable}


@pytest.fixture
def plan():
    return make_coordinator().plan_round(1, ["id-0", "id-1", "id-2", "id-3"])


def read(plan, replies, norms=None, limits=None, sent=SENT):
    reader = UpdateReader(PARTITION, tuple(sent), 10.0)
    return read_replies(
        reader,
        plan,
        replies,
        sent,
        norms or NormHistory(),
        limits or NormLimits(np.inf, np.inf),
    )


def manifest(sent):
    """The whole model in two pieces, of which the second may be left out."""
    half = len(SENT) // 2
    pieces = (range(half), True), (range(half, len(SENT)), sent)
    return Manifest(tuple(Piece("digest", tuple(p), s) for p, s in pieces))


def lost_copy(plan, device):
    report = {**honest_reply(plan, device).report, "update-kind": "nothing"}
    return honest_reply(plan, device, report=report, tensors=[], num_examples=0)


def test_a_copy_is_lost_where_something_was_left_out_and_else_the_device_failed(plan):
    truthful, liar, honest = plan.assignments
    plan = replace(plan, manifests={truthful: manifest(False), liar: manifest(True)})
    replies = [
        lost_copy(plan, truthful),
        lost_copy(plan, liar),
        honest_reply(plan, honest),
    ]
    read_in = read(plan, replies)
    assert read_in.refused == {"lost-copy": 2}
    assert read_in.lost_copies == {truthful, liar}
    assert read_in.lacked_bytes == {liar: 0.0, honest: None}


def test_so_it_did_where_there_is_no_manifest_at_all(plan):
    liar, *others = plan.assignments
    read_in = read(plan, [lost_copy(plan, liar)])
    assert read_in.lacked_bytes == {liar: 0.0, **dict.fromkeys(others, 0.0)}


def test_a_lost_copy_that_is_told_of_twice_is_lost_once(plan):
    truthful, *_ = plan.assignments
    plan = replace(plan, manifests={truthful: manifest(False)})
    read_in = read(plan, 2 * [lost_copy(plan, truthful)])
    assert read_in.refused == {"lost-copy": 2}
    assert truthful not in read_in.lacked_bytes


def test_the_first_usable_reply_counts_and_the_first_refusal_is_told(plan):
    first, second, third = plan.assignments
    unreadable = honest_reply(plan, first, tensors=[b"1"])
    late = {**honest_reply(plan, first).report, "server-round": 7}
    replies = [
        unreadable,
        honest_reply(plan, first, report=late),
        honest_reply(plan, first, value=0.25),
        honest_reply(plan, first, value=9.0),
        honest_reply(plan, first, value=9.0),
        honest_reply(plan, second),
    ]
    read_in = read(plan, replies)
    assert [*read_in.accepted] == [first, second]
    for gradient in read_in.accepted[first].update.gradients.values():
        assert np.all(gradient == 0.25)
    assert read_in.refused == {"wrong-array": 1, "late": 1, "duplicate": 2}
    assert [*read_in.refusals] == [first]
    assert read_in.refusals[first].startswith("wrong-array: gradients: ")
    assert read_in.lacked_bytes == {first: None, second: None, third: 0.0}
    twice = read(plan, 2 * [honest_reply(plan, third)])
    assert twice.refusals == {third: "duplicate: the device replied before"}


def test_who_was_not_asked_has_no_part_in_it(plan):
    (idle,) = set(plan.device_ids) - set(plan.assignments)
    some, *_ = plan.assignments
    replies = [
        replace(honest_reply(plan, some), device_id=idle),
        replace(honest_reply(plan, some), device_id="stranger"),
    ]
    read_in = read(plan, replies)
    assert read_in.accepted == {}
    assert read_in.refused == {"not-asked": 2}
    assert set(read_in.refusals) == {idle, "stranger"}
    assert read_in.lacked_bytes == dict.fromkeys(plan.assignments, 0.0)


def test_a_device_without_the_memory_lacks_what_its_block_needs(plan):
    short, broken, _ = plan.assignments
    needed = replace(plan.assignments[short], memory_bytes=5e8)
    plan = replace(plan, assignments={**plan.assignments, short: needed})
    replies = [
        honest_reply(plan, short, report={"failure": "out-of-memory"}),
        honest_reply(plan, broken, report={"failure": "fire"}),
    ]
    read_in = read(plan, replies)
    assert read_in.refused == {"out-of-memory": 1, "device-failure": 1}
    assert read_in.lacked_bytes[short] == 5e8
    assert read_in.lacked_bytes[broken] == 0.0


def test_what_was_of_no_use_is_known_by_the_kind_of_update(plan):
    gradient, weights, estimate = plan.assignments
    names = PARTITION.update_names(plan.assignments[weights].block_index)
    tensors = {name: npy(SENT[name]) for name in names}
    statistic = {"layer.running_mean": npy(np.float32([1.0]))}
    asked = {"direction_seed": 1, "num_directions": 2}
    zeroth_order = replace(
        plan.assignments[estimate], perturbation=1.0, smallest_share=1.0, **asked
    )
    plan = replace(plan, assignments={**plan.assignments, estimate: zeroth_order})
    report = honest_reply(plan, weights).report
    projected = {
        **honest_reply(plan, estimate).report,
        "update-kind": "zeroth-order",
        "direction-seed": 1,
        "projections": bytes(np.float32([1, 2])),
    }
    tensor = npy(np.float32([1]))
    replies = [
        honest_reply(
            plan,
            gradient,
            tensors=[honest_reply(plan, gradient).tensors[0]],
            upload_s=1.5,
        ),
        honest_reply(
            plan,
            weights,
            tensors={**tensors, **statistic, "other": tensor},
            report={**report, "update-kind": "weights"},
        ),
        honest_reply(plan, estimate, tensors=[tensor], report=projected),
    ]
    sent = {**SENT, "layer.running_mean": np.float32([0.0])}
    read_in = read(plan, replies, sent=sent)
    assert read_in.refused == {}
    uploads = {device: reply.upload for device, reply in read_in.accepted.items()}
    assert uploads[gradient].ignored_arrays == 0
    assert uploads[gradient].upload_s == 1.5
    assert uploads[weights].ignored_arrays == 1
    assert uploads[estimate].ignored_arrays == 1
    kinds = [reply.report.update_kind for reply in read_in.accepted.values()]
    assert kinds == ["gradient", "weights", "zeroth-order"]
    # The norm of an estimate says nothing of its block's.
    blocks = [plan.assignments[device].block_index for device in (gradient, weights)]
    assert set(read_in.norms.of_block) == set(blocks)


def norm_of(plan, device, value):
    """Euclidean norm of a gradient of equal elements."""
    return value * size_of_update(plan, device) ** 0.5


def size_of_update(plan, device):
    return size_of(PARTITION.update_names(plan.assignments[device].block_index))


def test_norms_are_told_in_the_order_of_the_plan_before_they_are_limited(plan):
    history = NormHistory({0: (1.0,), 1: (2.0,), 2: (3.0,)})
    limits = NormLimits(max_norm=1.0, factor=np.inf)
    values = dict(zip(plan.assignments, (0.01, 3.0, 5.0), strict=True))
    replies = [honest_reply(plan, d, value=v) for d, v in values.items()]
    for order in (replies, replies[::-1]):
        read_in = read(plan, order, history, limits)
        assert read_in.refused == {}
        for device, value in values.items():
            block = plan.assignments[device].block_index
            norm = norm_of(plan, device, value)
            before = history.of_block[block]
            assert read_in.norms.of_block[block] == (*before, pytest.approx(norm))
            update = read_in.accepted[device].update
            assert update.norm == pytest.approx(norm)
            for gradient in update.gradients.values():
                np.testing.assert_allclose(gradient, value / max(norm, 1.0), rtol=1e-5)


def several_blocks():
    coordinator = make_coordinator(num_devices=2)
    plan = coordinator.plan_round(1, ["id-0", "id-1"])
    (device,) = (d for d, a in plan.assignments.items() if len(a.blocks) == 2)
    return plan, device, plan.assignments[device].blocks


def test_an_update_of_several_blocks_has_the_norm_of_each_with_the_head():
    plan, device, blocks = several_blocks()
    read_in = read(plan, [honest_reply(plan, device, value=0.5)])
    assert read_in.norms.of_block == {
        block: (pytest.approx(0.5 * size_of(PARTITION.update_names(block)) ** 0.5),)
        for block in blocks
    }


@pytest.mark.parametrize("place", [0, 1])
def test_an_update_one_of_whose_blocks_is_too_long_is_refused(place):
    plan, device, blocks = several_blocks()
    usual = {b: 0.5 * size_of(PARTITION.update_names(b)) ** 0.5 for b in blocks}
    history = NormHistory({block: 9 * (norm,) for block, norm in usual.items()})
    names = PARTITION.update_names(*blocks)
    lied = {*PARTITION.blocks[blocks[place]]}
    values = [
        np.full(SHAPES[name], 50.0 if name in lied else 0.5, "f4").ravel()
        for name in sorted(names)
    ]
    lie = honest_reply(plan, device, tensors=[npy(np.concatenate(values))])
    read_in = read(plan, [lie], history, NormLimits(np.inf, factor=2.0))
    assert read_in.refused == {"excessive-norm": 1}


def test_values_as_large_as_they_can_be_have_a_norm():
    plan, device, blocks = several_blocks()
    sent = [honest_reply(plan, device, value=3e38)]
    read_in = read(plan, sent, NormHistory(), NormLimits())
    assert read_in.refused == {"excessive-norm": 1}
    for block in blocks:
        (norm,) = read_in.norms.of_block[block]
        assert norm == pytest.approx(
            3e38 * size_of(PARTITION.update_names(block)) ** 0.5
        )


def test_norms_beyond_all_measure_are_refused_and_the_others_are_scaled_down(plan):
    usual, large, huge = plan.assignments
    norms = {d: norm_of(plan, d, 1.0) for d in plan.assignments}
    history = NormHistory(
        {plan.assignments[d].block_index: 9 * (norm,) for d, norm in norms.items()}
    )
    values = {usual: 1.0, large: 19.0, huge: 21.0}
    replies = [honest_reply(plan, d, value=v) for d, v in values.items()]
    read_in = read(plan, replies, history, NormLimits(np.inf, factor=2.0))
    assert read_in.refused == {"excessive-norm": 1}
    assert read_in.refusals == {huge: f"excessive-norm: {21 * norms[huge]:g}"}
    assert read_in.lacked_bytes == {usual: None, large: None, huge: 0.0}
    scaled = {
        device: reply.update.gradients["head.w"][0, 0]
        for device, reply in read_in.accepted.items()
    }
    assert scaled == {usual: 1.0, large: pytest.approx(1.0)}
    both = read(
        plan,
        [replies[2], honest_reply(plan, large, value=30.0), replies[2]],
        history,
        NormLimits(np.inf, factor=2.0),
    )
    assert both.refused == {"excessive-norm": 2, "duplicate": 1}
    assert both.refusals[huge] == "duplicate: the device replied before"


def test_who_keeps_the_round_waiting_has_failed_and_is_used_all_the_same(plan):
    late, *others = plan.assignments

    def replies(**late_report):
        report = {**honest_reply(plan, late).report, **late_report}
        yield honest_reply(plan, late, report=report, upload_s=1.0, answered_s=9.0)
        for device in others:
            yield honest_reply(plan, device, upload_s=1.0, answered_s=2.0)

    read_in = read(plan, replies())
    assert read_in.unexplained_s == {late: 7.0}
    assert read_in.accepted.keys() == plan.assignments.keys()
    assert read_in.lacked_bytes == {late: 0.0, **dict.fromkeys(others)}
    # Seconds that it says it computed explain it, those of another clock do not.
    told = {"compute-s": 7.0, "compute-clock": "measured"}
    assert read(plan, replies(**told)).unexplained_s == {}
    told["compute-clock"] = "simulated"
    assert read(plan, replies(**told)).unexplained_s == {late: 7.0}
    # One that it does not tell is none.
    told = {"compute-clock": "measured"}
    untold = {
        k: v for k, v in honest_reply(plan, late).report.items() if k != "compute-s"
    }
    silent = [
        replace(r, report={**untold, **told}) if r.device_id == late else r
        for r in replies()
    ]
    assert read(plan, silent).unexplained_s == {late: 7.0}
    # Where nothing is timed, nothing is known.
    untimed = [replace(reply, upload_s=None) for reply in replies()]
    assert read(plan, untimed).unexplained_s == {}
