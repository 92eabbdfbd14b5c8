"""Streams of gradients, of which some devices' are not honest."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lola_flwr.run.values import from_values, to_values
from lola_flwr.server.directions import Direction
from lola_flwr.server.likelihoods import Agreements, Honest
from lola_flwr.server.reputation import HEAD, Reputation
from tests.marks import rest_slow

DEVICES = [f"device-{n}" for n in range(8)]
HOSTILE = {"device-2", "device-5"}
ROUNDS = 60


def kept(vector):
    return np.rint(vector * (4000 / np.linalg.norm(vector))).astype(np.int16)


def stream(change, *, signal=0.6, classes=0.0, seed=0):
    """Give each round's directions: two devices each send a block's and the head's.

    Signals turn slowly, as gradients do while a model learns.
    """
    rng = np.random.default_rng(seed)
    ways = rng.standard_normal((3, 64))
    pull = rng.standard_normal((3, 64))
    for server_round in range(ROUNDS):
        ways += 0.1 * rng.standard_normal(ways.shape)
        arrived = []
        for block, number in enumerate(rng.permutation(len(DEVICES))[:2]):
            device, side = DEVICES[number], (1 if number % 2 else -1)
            for part in (block, HEAD):
                vector = signal * ways[part] + rng.standard_normal(64)
                vector += classes * side * pull[part]
                if device in HOSTILE:
                    vector = change(vector, part, rng)
                arrived.append((part, Direction(device, server_round, kept(vector))))
        yield arrived


def after(change, **options):
    reputation = Reputation()
    for arrived in stream(change, **options):
        reputation = reputation.after_directions(arrived)
    return reputation


def honest(vector, part, rng):
    return vector


ATTACKS = {
    "sign flip": lambda vector, part, rng: -vector,
    "of the blocks alone": lambda vector, part, rng: (
        vector if part == HEAD else -vector
    ),
    "of the head alone": lambda vector, part, rng: -vector if part == HEAD else vector,
    "scaled": lambda vector, part, rng: -30.0 * vector,
}


@pytest.mark.parametrize(
    ("attack", "classes"),
    [
        *((attack, 0.0) for attack in ATTACKS),
        # Less is left to compare where classes differ; of the head there is more of it.
        *((attack, 3.0) for attack in ATTACKS if attack != "of the blocks alone"),
    ],
)
def test_who_turns_gradients_round_counts_less_and_nobody_else(attack, classes):
    reputation = after(ATTACKS[attack], classes=classes)
    weights = {device: reputation.weight(device) for device in DEVICES}
    assert all(weights[device] < 0.5 for device in HOSTILE), weights
    assert all(weights[d] > 0.5 for d in DEVICES if d not in HOSTILE), weights


@pytest.mark.parametrize("classes", rest_slow([0.0, 3.0]))
@pytest.mark.parametrize("signal", [0.0, 0.6])
def test_honest_devices_count_fully_whether_or_not_gradients_tell_anything(
    signal, classes
):
    weights = [
        after(honest, signal=signal, classes=classes, seed=seed).weight(device)
        for seed in range(3)
        for device in DEVICES
    ]
    assert min(weights) > 0.1
    assert np.mean(np.less(weights, 1)) < 0.1


def test_of_few_devices_one_that_differs_is_not_soon_taken_for_hostile():
    # Heads of six honest devices after 250 rounds of CoLA.
    others, odd = (0.018, 0.109, 0.088, 0.151, 0.037), -0.085

    def told(times):
        devices = [
            Agreements(65.0, 65 * mean, 65 * (mean**2 + 0.0335))
            for mean in (*others * times, odd)
        ]
        return Honest.of(devices).log_likelihood(devices[-1])

    assert told(1) > -2.5, "it counts for a tenth at least"
    assert told(10) < -3.0, "it is refused"


def told_by_examples(means, own_mean, *, count=14.3, square=0.014):
    devices = [Agreements(count, count * m, count * (m**2 + square)) for m in means]
    own = Agreements(41.3, 41.3 * own_mean, 41.3 * (own_mean**2 + square))
    known = Honest.shown(devices, own)
    return [known.log_likelihood(device) for device in devices]


def test_who_agrees_less_than_the_servers_examples_do_is_not_taken_for_hostile():
    # Heads of six honest devices after 16 rounds of CoLA.
    told = told_by_examples((0.023, -0.053, 0.019, -0.005, -0.053, 0.087), 0.059)
    assert min(told) > -1.0


@pytest.mark.parametrize("num_hostile", [1, 3, 7])
def test_the_servers_examples_tell_who_is_hostile_even_where_most_are(num_hostile):
    means = [0.15, 0.11, 0.2, 0.13, *(-0.15,) * num_hostile]
    told = told_by_examples(means, 0.2)
    assert max(told[4:]) < -3.0
    assert min(told[:4]) > 1.0


@settings(max_examples=60, deadline=None)
@given(
    mean=st.floats(0.01, 0.5),
    between=st.floats(1e-4, 0.1),
    count=st.floats(4, 60),
    freedom=st.sampled_from([2, 7, 30, math.inf]),
)
def test_the_more_others_agreed_the_likelier_a_device_is_honest(
    mean, between, count, freedom
):
    known = Honest(mean, 0.1, between, few=4.0, freedom=freedom)
    cosines = np.linspace(-1, 1, 21)
    told = [
        known.log_likelihood(Agreements(count, count * x, count * x * x))
        for x in cosines
    ]
    assert told == sorted(told)
    assert told[10] == 0.0
    np.testing.assert_allclose(told, [-x for x in told[::-1]], rtol=1e-9, atol=1e-12)


def test_nobody_is_judged_by_one_or_two_gradients():
    reputation = Reputation()
    for arrived in [*stream(ATTACKS["sign flip"])][:5]:
        reputation = reputation.after_directions(arrived)
    assert {reputation.weight(device) for device in (*DEVICES, "new")} == {1.0}


def test_newcomers_count_less_until_they_were_compared_and_at_the_start_none_does():
    def compared(times):
        reputation = Reputation()
        for device, n in times.items():
            for _ in range(n):
                reputation = reputation.after_shown({device: {0: 0.5}}, [])
        return reputation

    for n in (0, 1, 5, 60):
        alike = compared(dict.fromkeys(DEVICES, n))
        assert {alike.weight(device) for device in DEVICES} == {1.0}
    known = dict.fromkeys(DEVICES, 60)
    weights = [compared({**known, "new": n}).weight("new") for n in range(14)]
    assert 0 < weights[0] < 0.1
    assert weights == sorted(weights)
    assert weights[-1] == 1
    assert compared(known).weight("never seen") == weights[0]
    # A device that is asked a third as often as others is no newcomer for long.
    assert compared({**known, "slow": 20}).weight("slow") == 1


@pytest.mark.parametrize("part", [0, HEAD])
def test_who_works_against_the_servers_examples_is_found(part):
    rng = np.random.default_rng(0)
    reputation = Reputation()
    for _ in range(24):
        among = [{part: 0.14 + 0.14 * noise} for noise in rng.standard_normal(4)]
        cosines = {
            device: {part: (-0.1 if device in HOSTILE else 0.14) + 0.14 * noise}
            for device, noise in zip(DEVICES, rng.standard_normal(8), strict=True)
        }
        reputation = reputation.after_shown(cosines, among)
    assert all(reputation.weight(device) < 0.1 for device in HOSTILE)
    assert {reputation.weight(d) for d in DEVICES if d not in HOSTILE} == {1.0}


def test_by_the_servers_examples_hostile_devices_are_known_though_no_other_is_asked():
    reputation, rng = Reputation(), np.random.default_rng(0)
    for server_round in range(3):
        noise = 0.1 * rng.standard_normal((4, 2))
        among = [{0: 0.2 + block, HEAD: 0.2 + head} for block, head in noise]
        turned = {device: {0: -0.2, HEAD: -0.2} for device in HOSTILE}
        reputation = reputation.after_shown(turned, among)
        if server_round == 0:
            assert all(reputation.weight(device) < 0.7 for device in HOSTILE)
    assert {reputation.weight(device) for device in HOSTILE} == {0.0}
    # Without what the server's examples say of each other they would be the majority.
    alone = Reputation().after_shown(turned, [])
    assert {alone.weight(device) for device in HOSTILE} == {1.0}


def test_many_blocks_of_one_mini_batch_tell_of_a_device_what_one_of_them_does():
    def against(num_blocks):
        """Return what is known after a mini-batch that is unlike all others."""
        rng, reputation = np.random.default_rng(1), Reputation()
        noise = 0.1 * rng.standard_normal((4, num_blocks))
        among = [dict(enumerate(0.2 + some)) for some in noise]
        odd = {"odd": dict.fromkeys(range(num_blocks), -0.15)}
        reputation = reputation.after_shown(odd, among)
        every = reputation.of_device["odd"].of_kind("blocks shown")
        assert every.count == 1
        assert every.mean == pytest.approx(-0.15)
        return reputation.weight("odd")

    assert against(12) == pytest.approx(against(1), rel=0.3)
    assert against(12) > 0.1


def test_far_too_long_updates_speak_against_a_device_until_they_are_long_past():
    usual = Reputation().after_lengths([("a", 2.9), ("b", 0.0)] * 30)
    assert usual.weight("a") == usual.weight("b") == 1
    once = Reputation().after_lengths([("a", 9.9)])
    assert 0.1 < once.weight("a") <= 0.5
    # Twice may be by chance, too: of the demo's honest devices one's were.
    twice = once.after_lengths([("a", 9.9)])
    assert 0.0 < twice.weight("a") < 0.2
    often = twice.after_lengths([("a", 9.9)])
    assert often.weight("a") == 0
    assert often.after_lengths([("a", 1.0)] * 20).weight("a") == 1
    # However long it was: what happens once may be an accident.
    absurd = Reputation().after_lengths([("a", 1e30)])
    assert absurd.weight("a") == pytest.approx(once.weight("a"), rel=0.03)
    assert absurd.after_lengths([("a", 1e30)] * 2).weight("a") == 0


def test_an_update_that_came_before_is_known():
    reputation = Reputation().after_digests([("a", "1"), ("b", "2")])
    assert reputation.has_seen("a", "1")
    assert not reputation.has_seen("a", "2")
    assert not reputation.has_seen("c", "1")
    others = [("a", f"later {n}") for n in range(31)]
    assert reputation.after_digests(others).has_seen("a", "1")
    assert not reputation.after_digests([*others, ("a", "last")]).has_seen("a", "1")
    # Sent again and again, it stays among the latest.
    again = reputation.after_digests([*others, ("a", "1"), *others])
    assert again.has_seen("a", "1")


def test_the_key_is_drawn_once_from_what_came_first():
    reputation = Reputation().keyed(["1", "2"])
    assert reputation.key > 0
    assert reputation.keyed(["3"]) is reputation
    assert Reputation().keyed(["1", "3"]).key != reputation.key


def test_it_goes_on_from_a_checkpoint_bit_for_bit():
    rounds = [*stream(ATTACKS["sign flip"])]
    straight = resumed = Reputation().keyed(["1"])
    states = [straight]
    for arrived in rounds:
        straight = straight.after_directions(arrived).after_lengths([("a", 7.0)])
        resumed = resumed.after_directions(arrived).after_lengths([("a", 7.0)])
        resumed = from_values(Reputation, json.loads(json.dumps(to_values(resumed))))
        states.append(straight)
    assert to_values(resumed) == to_values(straight)
    # Of every round's state nothing is changed by the next.
    assert all(to_values(a) != to_values(b) for a, b in pairwise(states))
