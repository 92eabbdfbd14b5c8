"""What the server reads out of a device's reply, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lola_flwr.server.replies import (
    DeviceReply,
    UpdateReader,
    UpdateRefused,
    Upload,
)
from lola_flwr.wire.codec import codec_named
from lola_flwr.wire.low_rank import LowRankProjection
from lola_flwr.wire.packing import GRADIENTS, pack
from lola_flwr.wire.records import Assignment, UpdateReport
from lola_flwr.zeroth_order.directions import Directions, estimated_gradient
from tests.server.coordinators import PARTITION, SHAPES, npy

BLOCK, ROUND, MOST = 1, 3, 8
STATISTICS = {
    "layer.0.running_mean": np.float32([-1.0, 2.0]),
    "layer.0.running_var": np.float32([0.5, 4.0]),
    "layer.0.num_batches_tracked": np.array(7),
}
ASSIGNMENT = Assignment(
    server_round=ROUND,
    block_index=BLOCK,
    share=0.5,
    batch_size=MOST,
    codec="fp32",
    base_fingerprint="base",
)
ZEROTH_ORDER = replace(
    ASSIGNMENT,
    direction_seed=5,
    num_directions=3,
    perturbation=1e-3,
    smallest_share=1.0,
)
NAMES = PARTITION.update_names(BLOCK)


def drawn(seed, names=SHAPES, dtype=np.float32):
    """Values of which no two are alike, by name."""
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=SHAPES[name]).astype(dtype) for name in names}


SENT = {**drawn(1), **STATISTICS}


def report(**fields):
    known = {
        "server_round": ROUND,
        "block_index": BLOCK,
        "update_kind": "gradient",
        "loss": 0.7,
        "compute_s": 0.1,
        "compute_clock": "measured",
    }
    return UpdateReport(**{**known, **fields}).to_record()


def gradient_reply(gradients, codec="fp32", **fields):
    encoded = {n: codec_named(codec).encode(g) for n, g in gradients.items()}
    known = {"tensors": [npy(pack(encoded))], "num_examples": MOST, "report": report()}
    return DeviceReply("a", **{**known, **fields})


def weights_reply(weights, *, examples=MOST, fields=None):
    tensors = {name: npy(array) for name, array in weights.items()}
    record = report(update_kind="weights") if fields is None else fields
    return DeviceReply("a", tensors, examples, record)


def read(
    reply,
    assignment=ASSIGNMENT,
    sent=SENT,
    max_gradient_norm=10.0,
    example_weight=1,
):
    reader = UpdateReader(PARTITION, tuple(sent), max_gradient_norm, example_weight)
    return reader.read(reply, assignment, sent)


def refusal(reply, **options):
    with pytest.raises(UpdateRefused) as caught:
        read(reply, **options)
    assert str(caught.value).startswith(f"{caught.value.reason}: ")
    return str(caught.value)


GOOD = gradient_reply(drawn(2, NAMES))


def equal(found, expected):
    assert set(found) == set(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, strict=True)


def norm_of(arrays):
    together = np.concatenate([a.astype(np.float64).ravel() for a in arrays.values()])
    return np.linalg.norm(together)


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8", "topk:0.4"])
@pytest.mark.parametrize("by_name", [False, True])
def test_gradients_are_those_that_were_encoded(codec, by_name):
    gradients = drawn(2, NAMES)
    reply = gradient_reply(gradients, codec, num_examples=5)
    if by_name:
        reply = replace(reply, tensors={GRADIENTS: reply.tensors[0]})
    update, told = read(reply, replace(ASSIGNMENT, codec=codec))
    coder = codec_named(codec)
    expected = {n: coder.decode(coder.encode(g), g.shape) for n, g in gradients.items()}
    equal(update.gradients, expected)
    assert update.norm == pytest.approx(norm_of(expected), rel=1e-12)
    assert (update.num_examples, update.statistics) == (5, {})
    assert not update.zeroth_order
    assert told == UpdateReport.from_record(report())


def test_without_the_head_the_block_alone_travels():
    block = PARTITION.update_names(BLOCK, head=False)
    gradients = drawn(2, block)
    assignment = replace(ASSIGNMENT, sends_head=False)
    update, _ = read(gradient_reply(gradients), assignment)
    equal(update.gradients, gradients)
    assert "wrong-array: gradients: " in refusal(GOOD, assignment=assignment)


def test_projected_gradients_are_lifted():
    projection = LowRankProjection(rank=2, period=2, seed=4)
    gradients = drawn(2, NAMES)
    projected = {n: projection.project(ROUND, n, g) for n, g in gradients.items()}
    assignment = replace(ASSIGNMENT, **projection.assignment_fields())
    update, _ = read(gradient_reply(projected), assignment)
    expected = {
        n: projection.lift(ROUND, n, p, SHAPES[n]) for n, p in projected.items()
    }
    equal(update.gradients, expected)


@pytest.mark.parametrize("own", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("travels", ["own", np.float32])
def test_weights_are_moves_damped_where_all_blocks_move_at_once(own, travels):
    sent = {**drawn(1, dtype=own), **STATISTICS}
    dtype = own if travels == "own" else travels
    weights = drawn(2, dtype=dtype)
    statistics = {
        "layer.0.running_mean": np.float32([9.0, -3.0]),
        "layer.0.running_var": np.float32([0.0, 1e12]),
        "layer.0.num_batches_tracked": np.array(8),
    }
    stranger = {"layer.9.running_mean": np.float32([1e30])}
    reply = weights_reply({**stranger, **weights, **statistics}, examples=100)
    update, told = read(reply, sent=sent)
    wide = np.result_type(own, dtype, np.float32)
    moves = {
        n: (sent[n].astype(wide) - weights[n].astype(wide)).astype(np.float32)
        for n in NAMES
    }
    assert update.norm == pytest.approx(norm_of(moves), rel=1e-12)
    third = np.float32(1 / 3)
    expected = {n: m if n in PARTITION.head else third * m for n, m in moves.items()}
    equal(update.gradients, expected)
    equal(update.statistics, statistics)
    # Whoever trains longer than asked for weighs no more than others.
    assert update.num_examples == MOST
    assert told.update_kind == "weights"
    # Whose blocks have moved together, moves them whole.
    update, _ = read(reply, replace(ASSIGNMENT, trains_all=True), sent=sent)
    equal(update.gradients, moves)


def test_weights_come_in_the_order_of_the_names():
    weights = {n: drawn(2)[n] for n in NAMES}
    moves, _ = read(weights_reply({**weights, **STATISTICS}))
    tensors = [npy(array) for array in (*weights.values(), *STATISTICS.values())]
    reply = DeviceReply("a", tensors, 3, report(update_kind="weights"))
    update, _ = read(reply)
    equal(update.gradients, moves.gradients)
    equal(update.statistics, STATISTICS)
    assert update.num_examples == 3
    short = replace(reply, tensors=tensors[:-1])
    assert refusal(short) == "wrong-count: 5 arrays instead of 6"


def test_who_reports_nothing_returns_all_that_was_sent():
    everything = {**drawn(2), **STATISTICS}
    tensors = [npy(everything[name]) for name in SENT]
    reply = DeviceReply("a", tensors, 4, {"train-loss": 3.0})
    update, told = read(reply)
    moves, _ = read(weights_reply(everything))
    equal(update.gradients, moves.gradients)
    equal(update.statistics, STATISTICS)
    assert told == UpdateReport(ROUND, BLOCK, "weights", None, None, "")
    more = replace(reply, tensors=[*tensors, tensors[0]])
    assert (
        refusal(more) == f"wrong-count: {len(SENT) + 1} arrays instead of {len(SENT)}"
    )


def test_missing_arrays_are_counted_and_the_first_is_named():
    weights = drawn(2)
    del weights["layer.1.up"], weights["head.w"]
    refused = refusal(weights_reply(weights))
    assert refused == "wrong-count: 2 arrays missing, such as layer.1.up"


@pytest.mark.parametrize(
    ("statistic", "bad", "reason"),
    [
        ("layer.0.running_var", np.float32([1.0, -1.0]), "implausible: "),
        ("layer.0.running_mean", np.float32([1.0]), "wrong-array: "),
        ("layer.0.num_batches_tracked", np.array(7.0), "wrong-array: "),
    ],
)
def test_statistics_are_checked(statistic, bad, reason):
    refused = refusal(weights_reply({**drawn(2), **STATISTICS, statistic: bad}))
    assert refused.startswith(reason + statistic)
    if reason == "implausible: ":
        assert refused.endswith(f"{statistic} is no running statistic")


class TestZerothOrder:
    projections = np.array([3.0, -20.0, 0.5], "<f4")

    def reply(self, measured=projections, **fields):
        record = report(
            update_kind="zeroth-order",
            direction_seed=5,
            projections=bytes(measured),
        )
        record = {k: v for k, v in {**record, **fields}.items() if v is not None}
        return DeviceReply("a", [], MOST, record)

    def test_the_gradient_is_estimated_from_limited_projections(self):
        update, _ = read(self.reply(), ZEROTH_ORDER)
        expected = estimated_gradient(
            SENT,
            NAMES,
            directions=Directions(5, 3),
            projections=np.float32([3.0, -10.0, 0.5]),
        )
        equal(update.gradients, expected)
        assert update.zeroth_order
        assert np.isnan(update.norm)
        assert update.num_examples == MOST
        positive, _ = read(self.reply(-self.projections), ZEROTH_ORDER)
        equal(positive.gradients, {n: -g for n, g in expected.items()})

    @pytest.mark.parametrize(
        ("changes", "refused"),
        [
            (
                {"projections": bytes(11)},
                "wrong-projections: 11 bytes instead of 12",
            ),
            ({"projections": None}, "wrong-projections: 0 bytes instead of 12"),
            ({"direction-seed": 6}, "wrong-seed: is about the directions of seed 6"),
            (
                {"projections": bytes(np.float32([1, np.nan, 2]))},
                "non-finite: projections holds NaN or infinity",
            ),
            ({"update-kind": "gradient"}, "wrong-kind: holds 'gradient'"),
            ({"update-kind": "weights"}, "wrong-kind: holds 'weights'"),
            (
                {"update-kind": "nothing"},
                "lost-copy: the device no longer holds its version",
            ),
        ],
    )
    def test_refused(self, changes, refused):
        assert refusal(self.reply(**changes), assignment=ZEROTH_ORDER) == refused

    def test_nobody_estimates_who_was_not_asked_to(self):
        assert refusal(self.reply()) == "wrong-kind: holds 'zeroth-order'"


@pytest.mark.parametrize("kind", ["gradient", "weights"])
@pytest.mark.parametrize(
    ("examples", "taken"), [(1, 1), (MOST, MOST), (1.0, 1), (float(MOST), MOST)]
)
def test_examples_up_to_what_was_asked_for_count(kind, examples, taken):
    reply = GOOD if kind == "gradient" else weights_reply(drawn(2))
    update, _ = read(replace(reply, num_examples=examples))
    assert update.num_examples == taken
    assert type(update.num_examples) is int


@pytest.mark.parametrize(
    "examples", [0, -1, 2.5, 0.0, True, None, [8], "8", float("nan"), float("inf")]
)
def test_examples_that_are_no_number_of_examples(examples):
    claimed = 0 if examples == 0 else examples
    for reply in (GOOD, weights_reply(drawn(2))):
        refused = refusal(replace(reply, num_examples=examples))
        assert refused == f"wrong-examples: claims {claimed!r} examples of 8"


@pytest.mark.parametrize("examples", [MOST + 1, MOST + 1.0])
def test_more_examples_than_were_asked_for(examples):
    refused = refusal(replace(GOOD, num_examples=examples))
    assert refused == "wrong-examples: claims 9 of 8"


@pytest.mark.parametrize("examples", [MOST + 1, 5 * MOST])
def test_an_example_may_weigh_as_much_as_its_tokens(examples):
    update, _ = read(replace(GOOD, num_examples=examples), example_weight=5)
    assert update.num_examples == examples
    with pytest.raises(UpdateRefused, match="claims 41 of 40"):
        read(replace(GOOD, num_examples=5 * MOST + 1), example_weight=5)


@pytest.mark.parametrize(
    "fields",
    [
        {"compute_s": 0.0},
        {"compute_s": 86_400.0},
        {"compute_s": None},
        {"loss": 1e6},
        {"loss": -1e6},
        {"loss": None},
        {"peak_memory_bytes": 0.0},
        {"peak_memory_bytes": 1e15},
        {"compute_j": 0.0},
        {"compute_j": 1e9},
        {"compute_clock": ""},
        {"compute_clock": "measured"},
        {"compute_clock": "simulated"},
        {"uplink_limit": "pacing"},
        {"uplink_limit": "tc"},
    ],
    ids=str,
)
def test_reports_up_to_the_borders_are_believed(fields):
    update, told = read(replace(GOOD, report=report(**fields)))
    assert told == UpdateReport.from_record(report(**fields))
    assert update.num_examples == MOST


@pytest.mark.parametrize(
    ("fields", "refused"),
    [
        ({"server_round": 2}, "late: answers round 2"),
        ({"server_round": 4}, "late: answers round 4"),
        ({"block_index": 0}, "wrong-block: is for block 0"),
        ({"update_kind": "wishes"}, "wrong-kind: holds 'wishes'"),
        ({"update_kind": "zeroth-order"}, "wrong-kind: holds 'zeroth-order'"),
        ({"compute_s": -1e-9}, "implausible: compute_s=-1e-09"),
        ({"compute_s": 86_401.0}, "implausible: compute_s=86401"),
        ({"loss": 1.1e6}, "implausible: loss=1.1e+06"),
        ({"loss": -1.1e6}, "implausible: loss=-1.1e+06"),
        ({"peak_memory_bytes": -1.0}, "implausible: peak_memory_bytes=-1"),
        ({"peak_memory_bytes": 1.1e15}, "implausible: peak_memory_bytes=1.1e+15"),
        ({"compute_j": -1.0}, "implausible: compute_j=-1"),
        ({"compute_j": 1.1e9}, "implausible: compute_j=1.1e+09"),
        ({"compute_clock": "sun\n"}, r"malformed-report: compute-clock='sun\n'"),
        ({"uplink_limit": "rope\n"}, r"malformed-report: uplink-limit='rope\n'"),
        ({"update_kind": "nothing"}, "lost-copy: the device no longer holds its ver"),
    ],
)
def test_reports_beyond_them_are_not(fields, refused):
    assert refusal(replace(GOOD, report=report(**fields))).startswith(refused)


def test_reports_that_lack_a_field_are_malformed():
    record = report()
    del record["compute-clock"]
    refused = refusal(replace(GOOD, report=record))
    assert refused.startswith("malformed-report: compute-clock=None must be of type")


@pytest.mark.parametrize(
    ("record", "refused"),
    [
        ({"failure": "out-of-memory"}, "out-of-memory: 'out-of-memory'"),
        (
            {"failure": "out-of-memory", "detail": "needs\n1 GB"},
            r"out-of-memory: 'needs\n1 GB'",
        ),
        ({"failure": "fire", "detail": "in the shed"}, "device-failure: 'in the shed'"),
        ({"failure": 7}, "device-failure: 7"),
    ],
    ids=["memory", "memory in words", "another", "no word"],
)
def test_a_device_says_why_it_has_nothing(record, refused):
    assert refusal(replace(GOOD, report=record)).replace("'7'", "7") == refused
    # Whatever else it says.
    both = {**report(), **record}
    assert refusal(replace(GOOD, report=both)).replace("'7'", "7") == refused


def test_who_was_not_asked():
    refused = refusal(GOOD, assignment=None)
    assert refused == "not-asked: the device has no block this round"


def test_bytes_are_those_of_the_assignment_s_codec_and_shapes():
    head_first = {name: drawn(2)[name] for name in reversed(NAMES)}
    equal(read(gradient_reply(head_first))[0].gradients, drawn(2, NAMES) | head_first)
    refused = refusal(GOOD, assignment=replace(ASSIGNMENT, codec="bf16"))
    assert refused.startswith("wrong-array: gradients: ")
    refused = refusal(weights_reply({**drawn(2), "head.w": np.float32([[1.0]])}))
    assert refused.startswith("wrong-array: head.w: Array of shape (1, 1) and type ")
    assert refusal(weights_reply({**drawn(2), "head.w": np.ones((2, 4))}))


def test_wire_arrays_that_no_encoder_gives():
    codec = codec_named("topk:0.4")
    encoded = {n: codec.encode(g) for n, g in drawn(2, NAMES).items()}
    encoded[NAMES[0]] = np.zeros_like(encoded[NAMES[0]])
    reply = replace(GOOD, tensors=[npy(pack(encoded))])
    refused = refusal(reply, assignment=replace(ASSIGNMENT, codec="topk:0.4"))
    assert refused == (
        f"wrong-array: {NAMES[0]}: Positions of the values must rise, and be below 16."
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(bad):
    gradients = drawn(2, NAMES)
    gradients["layer.1.up"][2, 3] = bad
    refused = "non-finite: layer.1.up holds NaN or infinity"
    assert refusal(gradient_reply(gradients)) == refused
    assert refusal(weights_reply({**drawn(2), **gradients})) == refused


@pytest.mark.parametrize("by_name", [False, True])
def test_an_upload_is_all_that_was_sent_and_says_what_was_of_no_use(by_name):
    sizes = [10, 300, 7]
    tensors = [bytes(size) for size in sizes]
    reply = DeviceReply(
        "a", dict(zip("xyz", tensors, strict=True)) if by_name else tensors, 1, {}, 2.5
    )
    told = UpdateReport.from_record(report())
    assert Upload.of(reply, told, 1) == Upload(8.0 * 317, 2.5, 2)
    told = replace(told, projections=bytes(12))
    assert Upload.of(reply, told, 3) == Upload(8.0 * 329, 2.5, 0)


@pytest.mark.parametrize("codec", ["fp16", "bf16"])
def test_moves_that_were_encoded(codec):
    """They are a gradient: what was sent less what it became."""
    assignment = replace(ASSIGNMENT, codec=codec, trains_all=True)
    moves = {name: 1e-7 * move for name, move in drawn(5, NAMES).items()}
    wire = {n: npy(codec_named(codec).encode(m)) for n, m in moves.items()}
    wire |= {name: npy(values) for name, values in STATISTICS.items()}
    reply = DeviceReply("a", wire, MOST + 3, report(update_kind="moves"))
    update, _ = read(reply, assignment)
    assert update.num_examples == MOST
    assert {*update.statistics} == {*STATISTICS}
    for name, move in moves.items():
        np.testing.assert_allclose(update.gradients[name], move, rtol=2**-8)
    in_order = replace(reply, tensors=[*wire.values()])
    if set(STATISTICS) == {n for n in SENT if n in STATISTICS}:
        equal(read(in_order, assignment)[0].gradients, update.gradients)
    broken = replace(reply, tensors={**wire, NAMES[0]: npy(moves[NAMES[0]])})
    assert refusal(broken, assignment=assignment).startswith("wrong-array")
    spoiled = codec_named(codec).encode(np.full_like(moves[NAMES[0]], np.nan))
    broken = replace(reply, tensors={**wire, NAMES[0]: npy(spoiled)})
    assert refusal(broken, assignment=assignment).startswith("non-finite")
    # Whoever returns weights all the same is understood.
    weights = {name: SENT[name] - moves[name] for name in NAMES}
    assert read(weights_reply(weights), assignment)[1].update_kind == "weights"
