"""Components of adapters on their way: what a device sends, and what comes of it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from lola_flwr.allocation import inclusion_probabilities
from lola_flwr.device.encoding import encode_update
from lola_flwr.device.store import Residuals
from lola_flwr.errors import UserError
from lola_flwr.model.blocks import BlockPartition, partition_parameters
from lola_flwr.server.received import UpdateRefused
from lola_flwr.server.replies import DeviceReply, UpdateReader
from lola_flwr.wire.codec import CODECS
from lola_flwr.wire.components import (
    Drawn,
    checked_rank,
    component_axis,
    component_squares,
    components_of,
    full_rank,
    rank_ladder,
)
from lola_flwr.wire.payload import UpdateSizes
from lola_flwr.wire.records import Assignment, MalformedRecord, UpdateReport
from tests.allocation.test_inclusion import every_draw
from tests.server.coordinators import npy

RANK = 4
SHAPES = {
    "layer.0.q.lora_A.default.weight": (RANK, 6),
    "layer.0.q.lora_B.default.weight": (5, RANK),
    "layer.0.q.lora_magnitude_vector.default.weight": (5,),
    "layer.1.q.lora_A.default.weight": (RANK, 6),
    "layer.1.q.lora_B.default.weight": (5, RANK),
    "head.weight": (2, 6),
}
NAMES = [*SHAPES]
PARTITION = BlockPartition((tuple(NAMES[:3]), tuple(NAMES[3:5])), (NAMES[5],), ())
SQUARES = np.array([[8.0, 1.0, 2.0, 0.5], [1.0, 1.0, 1.0, 1.0]])
SENT = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}


def assignment(drawn=None, blocks=(0,), **fields) -> Assignment:
    return Assignment(
        server_round=fields.pop("server_round", 1),
        block_index=blocks[0],
        further_blocks=" ".join(map(str, blocks[1:])) or None,
        share=1.0,
        batch_size=8,
        codec=fields.pop("codec", "fp32"),
        base_fingerprint="",
        components=None if drawn is None else drawn.to_text(),
        **fields,
    )


def draw(points=(0.4, 0.7), rank=2, blocks=(0,)) -> Drawn:
    squares = {block: SQUARES[block] for block in blocks}
    return Drawn.of(squares, rank, {block: points[block] for block in blocks})


def gradients_of(rng):
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}


def reply(asked, array) -> DeviceReply:
    report = UpdateReport(
        server_round=asked.server_round,
        block_index=asked.block_index,
        update_kind="gradient",
        loss=0.5,
        compute_s=0.1,
        compute_clock="simulated",
    )
    return DeviceReply("phone", [npy(array)], 8, report.to_record())


def read(asked, drawn, array):
    reader = UpdateReader(PARTITION, tuple(SHAPES), 10.0)
    return reader.read(reply(asked, array), asked, SENT, drawn)[0]


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_what_the_server_assembles_is_the_gradient_in_the_mean(rng, rank):
    """From device to server, by enumeration of all draws."""
    gradients = gradients_of(rng)
    mean = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    square = 0.0
    probability = inclusion_probabilities(SQUARES[0], rank)
    for components, chance in every_draw(probability):
        drawn = Drawn(
            {0: tuple(components.tolist())}, {0: 1.0 / probability[components]}
        )
        asked = assignment(drawn)
        update = read(asked, drawn, encode_update(gradients, PARTITION, asked, None))
        square += chance * update.norm**2
        for name, gradient in update.gradients.items():
            mean[name] += chance * gradient
    names = PARTITION.update_names(0, head=True)
    assert {n for n, m in mean.items() if m.any()} == {*names}
    for name in names:
        np.testing.assert_allclose(mean[name], gradients[name], atol=1e-5)
    # The norm that updates are judged by is that of the whole gradient, in the mean.
    whole = sum(float(np.square(gradients[name]).sum()) for name in names)
    assert square == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("codec", [*CODECS, "topk:0.3"])
@pytest.mark.parametrize("blocks", [(0,), (0, 1)])
def test_what_travels_is_as_large_as_was_counted(rng, tmp_path, codec, blocks):
    drawn = draw(blocks=blocks)
    asked = assignment(drawn, blocks, codec=codec)
    residuals = Residuals(tmp_path, "phone")
    array = encode_update(gradients_of(rng), PARTITION, asked, residuals)
    whole = UpdateSizes(PARTITION, SHAPES, codec, "every")
    part = replace(whole, rank=2)
    trained = np.ones(2, bool)
    bits = [s.payloads(1, trained, [blocks]).bits[0, 0] for s in (part, whole)]
    full = encode_update(gradients_of(rng), PARTITION, assignment(None, blocks), None)
    if codec == "fp32":
        assert bits[1] - bits[0] == 8 * (full.nbytes - array.nbytes) > 0
    update = read(asked, drawn, array)
    assert {n: g.shape for n, g in update.gradients.items()} == {
        n: SHAPES[n] for n in PARTITION.update_names(*blocks, head=True)
    }
    assert math.isfinite(update.norm)


def test_what_was_not_drawn_is_zero_and_what_was_counts_more(rng):
    gradients, drawn = gradients_of(rng), draw()
    asked = assignment(drawn)
    update = read(asked, drawn, encode_update(gradients, PARTITION, asked, None))
    sent, weights = [*drawn.components[0]], drawn.weights[0].astype(np.float32)
    for name, axis in (("lora_A", 0), ("lora_B", 1)):
        name = f"layer.0.q.{name}.default.weight"
        whole = np.moveaxis(update.gradients[name], axis, 0)
        own = np.moveaxis(gradients[name], axis, 0)
        np.testing.assert_array_equal(whole[sent], own[sent] * weights[:, None])
        assert not np.delete(whole, sent, axis=0).any()
    for name in ("layer.0.q.lora_magnitude_vector.default.weight", "head.weight"):
        np.testing.assert_array_equal(update.gradients[name], gradients[name])
    squares = component_squares(update.gradients, PARTITION.blocks[0], drawn, 0)
    whole = component_squares(gradients, PARTITION.blocks[0], None, 0)
    assert [*squares] == sent
    assert [*whole] == [0, 1, 2, 3]
    assert squares == pytest.approx({one: whole[one] for one in sent})


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros(3, np.float32), "wrong-array"),
        (np.zeros(61 + 12, np.float32), "wrong-array"),
        (np.full(39, np.nan, np.float32), "non-finite"),
        (np.full(39, 3e38, np.float32), "non-finite"),
    ],
)
def test_what_is_no_such_part_is_refused(array, reason):
    drawn = draw()
    size = encode_update(
        gradients_of(np.random.default_rng(0)), PARTITION, assignment(drawn), None
    ).size
    assert size == 39
    with pytest.raises(UpdateRefused) as refused:
        read(assignment(drawn), drawn, array)
    assert refused.value.reason == reason


@pytest.mark.parametrize("codec", ["int8", "topk:0.2"])
def test_nothing_that_a_codec_leaves_out_is_lost(rng, tmp_path, codec):
    """What was sent of a component and what is left are what the device has found."""
    residuals = Residuals(tmp_path, "phone")
    rounds = [draw((point, 0.0)) for point in (0.1, 0.6, 0.3, 0.9)]
    found = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    sent = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for server_round, drawn in enumerate(rounds, start=1):
        gradients = gradients_of(rng)
        asked = assignment(drawn, codec=codec, server_round=server_round)
        array = encode_update(gradients, PARTITION, asked, residuals)
        plain = Drawn(drawn.components, {0: np.ones(2)})
        update = read(asked, plain, array)
        for name in PARTITION.update_names(0, head=True):
            part = gradients[name]
            axis = component_axis(name)
            if axis is not None:
                kept = np.isin(np.arange(RANK), drawn.components[0])
                part = part * (kept[:, None] if axis == 0 else kept)
            found[name] += part
            sent[name] += update.gradients[name]
    left = {
        **residuals.take("block-0", len(rounds) + 1),
        **residuals.take("head", len(rounds) + 1),
    }
    for name in PARTITION.update_names(0, head=True):
        np.testing.assert_allclose(sent[name] + left[name], found[name], atol=1e-5)
    assert max(np.abs(array).max() for array in left.values()) > 0


def test_components_come_back_from_their_text():
    drawn = draw(blocks=(0, 1))
    asked = assignment(drawn, (0, 1))
    assert asked == Assignment.from_record(asked.to_record())
    assert components_of(asked) == {b: [*c] for b, c in drawn.components.items()}
    assert components_of(assignment()) == {}


@pytest.mark.parametrize(
    "text", ["", "1 x", "1 2/3", "2 1", "1 1", "-1", "9" * 30, "1  2", "٣"]
)
def test_a_text_that_names_none_is_refused(text):
    with pytest.raises(MalformedRecord, match="names no components of 1 blocks"):
        components_of(replace(assignment(), components=text))


def test_a_component_that_the_device_lacks_is_said(rng):
    asked = replace(assignment(), components="1 7")
    with pytest.raises(UserError, match=r"Component 7 of layer.*, which has 4; use"):
        encode_update(gradients_of(rng), PARTITION, asked, None)


def test_ranks():
    assert full_rank(PARTITION, SHAPES) == checked_rank(PARTITION, SHAPES, "auto") == 4
    assert checked_rank(PARTITION, SHAPES, 4) == 4
    assert [rank_ladder(n) for n in (1, 2, 8, 12)] == [
        (1,),
        (1, 2),
        (1, 2, 4, 8),
        (1, 3, 6, 12),
    ]
    with pytest.raises(UserError, match=r"rank=5 is more than the adapters' own, 4"):
        checked_rank(PARTITION, SHAPES, 5)


def test_what_has_no_rank_is_refused():
    plain = partition_parameters(["layer.0.w", "layer.1.w", "head.w"])
    shapes = dict.fromkeys(plain.trainable, (4, 4))
    with pytest.raises(UserError, match=r"layer.0.w belongs to no adapter.*'lora'"):
        full_rank(plain, shapes)
    other = {**SHAPES, "layer.1.q.lora_A.default.weight": (2, 6)}
    with pytest.raises(UserError, match=r"has 2 and .* has 4, .*rank_pattern"):
        full_rank(PARTITION, other)
