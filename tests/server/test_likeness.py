from __future__ import annotations

import json

import numpy as np
import pytest

from lola_flwr.run.values import from_values, to_values
from lola_flwr.server.likeness import Likeness
from lola_flwr.server.own_examples import ExampleMean, Groups
from lola_flwr.server.reputation import Reputation

GROUPS = np.arange(64) % 2


def federation(rng, common, rounds=30, devices=6, batch_size=16):
    """Give examples of two classes, and what devices of one class each send.

    The first two have something in common, ``common`` times as long as their noise.
    """
    signal, pull, shared = rng.standard_normal((3, 128))
    noise = rng.standard_normal((64, 128))
    examples = {0: noise + 0.5 * signal + np.outer([1.0, -1.0], pull)[GROUPS]}
    for _ in range(rounds):
        received = []
        for number in range(devices):
            own = rng.standard_normal(128) + common * shared * (number < 2)
            sent = own / np.sqrt(batch_size) + 0.5 * signal
            sent += (-1) ** (number // 3) * pull
            received.append((f"device-{number}", {0: sent}))
        yield received, examples


def one_more(likeness, received, examples, batch_size=16, groups=GROUPS):
    means = {part: ExampleMean.of(rows) for part, rows in examples.items()}
    of_part = {part: Groups.of(rows, groups) for part, rows in examples.items()}
    return likeness.after(received, batch_size, means, of_part)


def after(rounds, batch_size=16):
    likeness = Likeness()
    for received, examples in rounds:
        likeness = one_more(likeness, received, examples, batch_size)
    return likeness


# Of large mini-batches it is mostly the server's few examples that are wrong.
@pytest.mark.parametrize("batch_size", [2, 16, 64, 1024])
def test_devices_of_one_class_have_a_voice_each(batch_size):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        rounds = federation(rng, common=0.0, batch_size=batch_size)
        likeness = after(rounds, batch_size)
        voices = [likeness.voice(f"device-{number}") for number in range(6)]
        assert min(voices) > 0.7
    assert likeness.voice("never seen") == 1


def test_devices_that_say_the_same_beyond_their_class_have_one_voice(rng):
    likeness = after(federation(rng, common=2.0))
    assert likeness.voice("device-0") == likeness.voice("device-1") == 0.5
    assert min(likeness.voice(f"device-{n}") for n in range(2, 6)) > 0.7
    # Longer updates say no more.
    louder = after(
        ([(d, {0: 100 * p[0]}) for d, p in received], examples)
        for received, examples in federation(np.random.default_rng(1), common=2.0)
    )
    assert louder.voice("device-0") == 0.5


def test_a_gang_has_one_voice_however_many_they_are(rng):
    shared = rng.standard_normal(64)
    examples = {0: rng.standard_normal((64, 64))}
    same = [(f"sybil-{n}", {0: shared + 0.1}) for n in range(8)]
    likeness = after([(same, examples)] * 2)
    voices = [likeness.voice(device) for device, _ in same]
    assert voices == [pytest.approx(1 / 8)] * 8


def test_what_devices_had_in_common_is_forgotten(rng):
    likeness = after(federation(rng, common=2.0))
    for received, examples in federation(rng, common=0.0, rounds=10):
        likeness = one_more(likeness, received, examples)
    assert likeness.voice("device-0") > 0.9


def test_where_classes_are_not_known_nobody_is_taken_for_another(rng):
    likeness = Likeness()
    for received, examples in federation(rng, common=2.0):
        likeness = one_more(likeness, received, examples, groups=np.zeros(64, int))
    assert not likeness.excess
    assert likeness.voice("device-0") == 1


def test_what_tells_nothing_is_passed_over(rng):
    same = {0: np.ones((64, 8))}
    received = [("a", {0: np.ones(8)}), ("b", {0: np.ones(8)})]
    assert after([(received, same)]).voice("a") == 1
    zeros = [("a", {0: np.zeros(8)}), ("b", {0: np.zeros(8)})]
    assert not after([(zeros, {0: rng.standard_normal((64, 8))})] * 3).latest


def test_it_is_part_of_a_checkpoint(rng):
    likeness = after(federation(rng, common=2.0, rounds=3))
    values = json.loads(json.dumps(to_values(Reputation(likeness=likeness))))
    read = from_values(Reputation, values).likeness
    assert read.excess == likeness.excess
    assert read.excess
    more = [*federation(rng, common=2.0, rounds=1)]
    for received, examples in more:
        one = one_more(likeness, received, examples)
        assert one.excess == one_more(read, received, examples).excess
