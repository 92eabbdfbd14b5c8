from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lola_flwr.server.directions import Direction, agreements, sketch

NAMES = ("a", "b")


def drawn(rng):
    gradients = {"a": rng.standard_normal((40, 30)), "b": rng.standard_normal(900)}
    return {name: array.astype(np.float32) for name, array in gradients.items()}


def mixed(one, other, share):
    return {n: (share * one[n] + (1 - share) * other[n]) for n in NAMES}


def cosine(one, other):
    one, other = one.astype(float), other.astype(float)
    return one @ other / np.sqrt((one @ one) * (other @ other))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.7, 1.0])
def test_cosines_of_sketches_are_those_of_the_gradients(rng, share):
    one, other = drawn(rng), drawn(rng)
    both = mixed(one, other, share)
    found = cosine(sketch(one, NAMES, 7), sketch(both, NAMES, 7))
    assert found == pytest.approx(share / np.hypot(share, 1 - share), abs=0.2)


def test_a_sketch_is_of_the_direction_alone_and_of_what_is_named(rng):
    one = drawn(rng)
    own = sketch(one, NAMES, 7)
    turned = sketch({n: -1e3 * g for n, g in one.items()}, NAMES, 7)
    np.testing.assert_array_equal(turned, -own)
    np.testing.assert_array_equal(sketch({**one, "c": one["a"]}, NAMES, 7), own)
    assert abs(cosine(sketch(one, NAMES, 8), own)) < 0.3
    assert sketch({n: 0 * g for n, g in one.items()}, NAMES, 7) is None


def seen(vectors, devices=None, rounds=None):
    names = devices or [f"device-{n}" for n in range(len(vectors))]
    return [
        Direction(
            name, n if rounds is None else rounds[n], np.rint(500 * v).astype("i2")
        )
        for n, (name, v) in enumerate(zip(names, vectors, strict=True))
    ]


def found(directions, weights=None, left_out=1):
    weights = weights or [1.0] * len(directions)
    return agreements(directions, weights, range(len(directions)), left_out=left_out)


def test_devices_of_different_classes_agree_in_what_is_no_matter_of_class(rng):
    signal, classes = rng.standard_normal((2, 64))
    noise = rng.standard_normal((16, 64))
    sides = np.resize([1, -1], 16)[:, None]
    vectors = signal + 4 * sides * classes + 0.5 * noise
    # As they are, two of different classes point away from each other.
    assert cosine(vectors[0], vectors[1]) < -0.5
    directions = seen(vectors)
    assert min(found(directions)) > 0.5
    # Who turns its gradient round has just the opposite: its own does not count.
    turned = replace(directions[5], sketch=-directions[5].sketch)
    again = found([*directions[:5], turned, *directions[6:]])
    assert again[5] == pytest.approx(-found(directions)[5])


def test_others_count_as_they_are_trusted_and_near(rng):
    signal = rng.standard_normal(64)
    vectors = np.tile(signal, (14, 1)) + 0.3 * rng.standard_normal((14, 64))
    vectors[7:] *= -1
    honest = [1.0] * 7 + [0.0] * 7
    assert found(seen(vectors), honest, left_out=0)[0] > 0.8
    assert found(seen(vectors), honest[::-1], left_out=0)[0] < -0.8
    late = [0] * 7 + [50] * 7
    assert found(seen(vectors, rounds=late), left_out=0)[0] > 0.8
    assert found(seen(vectors, rounds=late), left_out=0)[13] > 0.8


def test_nothing_is_told_of_a_device_by_its_own_and_by_few_others(rng):
    vectors = rng.standard_normal((8, 64))
    own = ["often"] * 3 + [f"{n}" for n in range(5)]
    assert found(seen(vectors, own))[0] is None
    assert None not in found(seen(vectors[:7]))
    assert found(seen(vectors[:6])) == [None] * 6
    # Where all is left out, nothing is left to compare.
    same = np.tile(vectors[0], (9, 1))
    assert found(seen(same)) == [None] * 9
