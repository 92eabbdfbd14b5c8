"""What a round's replies come to, whoever sent them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lola_flwr.server.norm_limits import NormHistory, NormLimits
from lola_flwr.server.replies import UpdateReader
from lola_flwr.server.round.intake import read_replies
from lola_flwr.wire.versions import Manifest, Piece
from tests.server.test_coordinator import (
    PARTITION,
    SHAPES,
    honest_reply,
    make_coordinator,
)

SENT = {name: np.ones(SHAPES[name], np.float32) for name in PARTITION.trainable}


@pytest.fixture
def plan():
    return make_coordinator().plan_round(1, ["id-0", "id-1", "id-2", "id-3"])


def read(plan, replies, norms=None, limits=None):
    reader = UpdateReader(PARTITION, tuple(SENT), 10.0)
    return read_replies(
        reader,
        plan,
        replies,
        SENT,
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
