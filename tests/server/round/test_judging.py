"""What a round's updates come to by what their devices sent before."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from lola_flwr.run.values import to_values
from lola_flwr.server.coordinator import Coordinator
from lola_flwr.server.reputation import Reputation
from lola_flwr.system.devices import simulated_device
from tests.server.coordinators import (
    PARTITION,
    SHAPES,
    honest_reply,
    make_coordinator,
    npy,
    size_of,
)

IDS = ["id-0", "id-1", "id-2", "id-3"]


def drawn(plan, device, seed, factor=1.0):
    names = PARTITION.update_names(*plan.assignments[device].blocks)
    values = np.random.default_rng(seed).standard_normal(size_of(names))
    return honest_reply(plan, device, tensors=[npy((factor * values).astype("f4"))])


def one_round(coordinator: Coordinator, server_round, sent):
    plan = coordinator.plan_round(server_round, IDS)
    before = {name: values.copy() for name, values in coordinator.values().items()}
    record = coordinator.complete_round(plan, sent(plan))
    moved = {n: v - before[n] for n, v in coordinator.values().items()}
    return plan, record, moved


def test_a_replayed_update_and_one_of_zeros_are_refused_and_their_devices_rest():
    coordinator = make_coordinator(num_devices=3, reputation=True)
    told = set()

    def always_the_same(plan):
        told.update((d, a.block_index) for d, a in plan.assignments.items())
        return [
            drawn(plan, device, [IDS.index(device), assignment.block_index])
            for device, assignment in plan.assignments.items()
        ]

    refused = 0
    for server_round in range(1, 6):
        before = set(told)
        plan, record, _ = one_round(coordinator, server_round, always_the_same)
        asked = {(d, a.block_index) for d, a in plan.assignments.items()}
        count = len(asked & before)
        assert record.refused == ({"replayed": count} if count else {})
        refused += count
    assert refused > 3
    profiles = coordinator.state.fleet.profiles
    absences = coordinator.state.fleet.absences
    assert any(absences.failures(profile.name) for profile in profiles.values())
    _, record, moved = one_round(
        coordinator, 6, lambda plan: [drawn(plan, d, 9, 0.0) for d in plan.assignments]
    )
    assert record.refused == {"all-zero": 3}
    assert not any(change.any() for change in moved.values())


def test_an_update_counts_as_its_device_is_trusted():
    def moved_with(lengths):
        coordinator = make_coordinator(reputation=True)
        names = [coordinator.state.fleet.profiles[device].name for device in IDS]
        evidence = [(name, times) for name in names for times in lengths]
        reputation = Reputation().after_lengths(evidence)
        coordinator.state = replace(coordinator.state, reputation=reputation)
        _, record, moved = one_round(
            coordinator,
            1,
            lambda plan: [drawn(plan, d, n) for n, d in enumerate(plan.assignments)],
        )
        return reputation.weight(names[0]), record, moved

    _, record, whole = moved_with([])
    assert record.refused == {}
    weight, record, less = moved_with([9.9])
    assert record.refused == {}
    assert 0.1 < weight <= 0.5
    for name, change in less.items():
        np.testing.assert_allclose(change, weight * whole[name], rtol=1e-5, atol=1e-7)
    weight, record, none = moved_with([9.9] * 3)
    assert record.refused == {"distrusted": 3}
    assert not any(change.any() for change in none.values())


def distrusting(names, *, failed):
    """Return a coordinator that distrusts devices, some of which failed already."""
    coordinator = make_coordinator(num_devices=3, reputation=True)
    reputation = Reputation().after_lengths((n, 9.9) for n in names for _ in range(3))
    fleet = coordinator.state.fleet
    absences = fleet.absences.after(1, dict.fromkeys(failed, 0.0), failed)
    coordinator.state = replace(
        coordinator.state,
        server_round=1,
        reputation=reputation,
        fleet=replace(fleet, absences=absences),
    )
    return coordinator


def asked(coordinator):
    plan = coordinator.plan_round(2, IDS)
    return {plan.profiles[device].name for device in plan.assignments}


def test_nobody_is_given_a_block_whose_update_will_be_refused():
    coordinator = make_coordinator(num_devices=3)
    names = {p.name for p in coordinator.state.fleet.profiles.values()}
    assert len(names) == 3 == len(PARTITION.blocks)
    one, *others = sorted(names)
    # It is tried, and when it has failed the blocks are shared among the others.
    assert asked(distrusting([one], failed=[])) == names
    assert asked(distrusting([one], failed=[one])) == set(others)
    # A trusted one is needed though it failed, and so is one of those that are not.
    assert asked(distrusting([], failed=[one])) == names
    assert asked(distrusting(names, failed=names)) == names


def test_what_devices_sent_is_part_of_the_state_unless_nobody_is_judged():
    def after(**options):
        coordinator = make_coordinator(**options)
        for server_round in (1, 2):
            one_round(
                coordinator,
                server_round,
                lambda plan: [
                    drawn(plan, d, plan.server_round * 10 + n)
                    for n, d in enumerate(plan.assignments)
                ],
            )
        return coordinator.state.reputation

    known = after(reputation=True)
    assert known.key > 0
    assert {part: len(seen) for part, seen in known.lately.items()} == {
        -1: 6,
        0: 2,
        1: 2,
        2: 2,
    }
    unknown = after(reputation=False)
    assert (unknown.key, unknown.lately, unknown.digests) == (0, {}, {})


def test_where_weights_are_returned_nobody_is_judged():
    state = {name: v.copy() for name, v in make_coordinator().values().items()}
    coordinator = make_coordinator(reputation=True, state_dict=state)
    plan = coordinator.plan_round(1, IDS)
    coordinator.complete_round(plan, [drawn(plan, d, 3) for d in plan.assignments])
    assert coordinator.state.reputation.key == 0


class OwnExamples:
    """Eight examples of the server's that pull about where it says."""

    count = 8
    groups = np.zeros(8, int)

    def __call__(self, values, chosen, rows):
        found = {}
        for number in chosen:
            rng = np.random.default_rng(
                [int(number), int(1e3 * values["head.w"].sum())]
            )
            for name, shape in sorted(SHAPES.items()):
                if name in rows:
                    pull = signal(name) + 0.5 * rng.standard_normal(shape)
                    found.setdefault(name, []).append(pull.reshape(-1).astype("f4"))
        return {name: np.stack(each) for name, each in found.items()}


class OwnExamplesOfTwoClasses(OwnExamples):
    """Of the second the gradients are far longer: the model does not know it."""

    count = 16
    groups = np.arange(16) // 8

    def __call__(self, values, chosen, rows):
        found = super().__call__(values, chosen, rows)
        times = np.where(np.asarray(chosen) < 8, 1, -12)[:, None]
        noise = {name: each[::-1] / 12 for name, each in found.items()}
        return {name: times * each + noise[name] for name, each in found.items()}


def signal(name):
    return np.random.default_rng([*name.encode()]).standard_normal(SHAPES[name])


def pulling(plan, hostile):
    """Honest updates but for a device's, which turns its block's round."""
    replies = []
    for device, assignment in plan.assignments.items():
        values = []
        for name in sorted(PARTITION.update_names(*assignment.blocks)):
            rng = np.random.default_rng([plan.server_round, *device.encode()])
            pull = signal(name) + 0.5 * rng.standard_normal(SHAPES[name])
            turned = device == hostile and name not in PARTITION.head
            values.append((-pull if turned else pull).reshape(-1))
        sent = npy(np.concatenate(values).astype("f4"))
        replies.append(honest_reply(plan, device, tensors=[sent]))
    return replies


def test_an_update_that_the_servers_examples_speak_against_counts_less_at_once():
    def moved_with(hostile, own_examples):
        coordinator = make_coordinator(reputation=True, own_examples=own_examples)
        plan, record, moved = one_round(
            coordinator, 1, lambda plan: pulling(plan, hostile)
        )
        assert not record.refused
        return coordinator, plan, moved

    examples = OwnExamples()
    coordinator, plan, honest = moved_with(None, examples)
    device = next(iter(plan.assignments))
    (block,) = plan.assignments[device].blocks
    _, _, alone = moved_with(device, None)
    _, _, judged = moved_with(device, examples)
    for name in PARTITION.blocks[block]:
        np.testing.assert_allclose(alone[name], -honest[name], rtol=1e-5)
        ratio = judged[name] / alone[name]
        assert ratio == pytest.approx(ratio.flat[0], rel=1e-3)
        assert 0.1 < ratio.flat[0] < 0.8
    others = {n for b in range(3) if b != block for n in PARTITION.blocks[b]}
    for name in others:
        np.testing.assert_allclose(judged[name], honest[name], rtol=1e-5)
    known = coordinator.state.reputation
    assert {part: len(p.lengths) for part, p in known.pulls.items()} == dict.fromkeys(
        (-1, 0, 1, 2), 8
    )


@pytest.mark.parametrize(("times", "is_as_it_was"), [(-12, True), (12, False)])
def test_a_long_update_counts_as_it_is_if_a_class_of_the_servers_examples_has_such(
    times, is_as_it_was
):
    coordinator = make_coordinator(
        reputation=True, own_examples=OwnExamplesOfTwoClasses()
    )
    for server_round in range(1, 5):
        one_round(coordinator, server_round, lambda plan: pulling(plan, None))

    def with_a_long_one(plan):
        device = next(iter(plan.assignments))
        names = sorted(PARTITION.update_names(*plan.assignments[device].blocks))
        long = [times * signal(name).reshape(-1) for name in names]
        sent = npy(np.concatenate(long).astype("f4"))
        others = [r for r in pulling(plan, None) if r.device_id != device]
        return [honest_reply(plan, device, tensors=[sent]), *others]

    plan, record, moved = one_round(coordinator, 5, with_a_long_one)
    device = next(iter(plan.assignments))
    name = plan.profiles[device].name
    assert {b.device: b.status for b in record.blocks}[name] == "accepted"
    (block,) = plan.assignments[device].blocks
    length = np.sqrt(sum(np.square(moved[n]).sum() for n in PARTITION.blocks[block]))
    whole = np.sqrt(sum(np.square(signal(n)).sum() for n in PARTITION.blocks[block]))
    part = length / (12 * whole)
    assert part == pytest.approx(1, rel=0.01) if is_as_it_was else part < 0.2
    told = coordinator.state.reputation.of_device[name].lengths
    assert told == 0 if is_as_it_was else told < -1


def test_what_examples_let_expect_limits_a_blocks_first_update_and_refuses_none():
    def moved_with(own_examples, factor):
        coordinator = make_coordinator(reputation=True, own_examples=own_examples)
        _, record, moved = one_round(
            coordinator,
            1,
            lambda plan: [
                drawn(plan, d, n, factor) for n, d in enumerate(plan.assignments)
            ],
        )
        assert not record.refused
        names = [n for block in PARTITION.blocks for n in block]
        return np.sqrt(sum(np.square(moved[name]).sum() for name in names))

    # Not more than 10, which is the largest norm, without examples.
    assert moved_with(None, 1e3) > 2 * moved_with(OwnExamples(), 1e3)
    # However long it is; how devices are trusted is drawn anew.
    times = moved_with(OwnExamples(), 1e4) / moved_with(OwnExamples(), 1e3)
    assert 0.5 < times < 2


def test_devices_that_say_the_same_have_a_voice_together():
    coordinator = make_coordinator(
        reputation=True, own_examples=OwnExamplesOfTwoClasses()
    )
    rng = np.random.default_rng(5)
    agreed = {name: 3 * rng.standard_normal(SHAPES[name]) for name in sorted(SHAPES)}

    def sent(plan):
        replies = pulling(plan, None)
        for place, (device, assignment) in enumerate(plan.assignments.items()):
            if device in IDS[:2]:
                names = sorted(PARTITION.update_names(*assignment.blocks))
                noise = np.random.default_rng([plan.server_round, place])
                same = [
                    agreed[n] + 0.1 * noise.standard_normal(SHAPES[n]) for n in names
                ]
                flat = np.concatenate([values.reshape(-1) for values in same])
                tensors = [npy(flat.astype("f4"))]
                replies[place] = honest_reply(plan, device, tensors=tensors)
        return replies

    for server_round in range(1, 9):
        one_round(coordinator, server_round, sent)
    profiles = coordinator.state.fleet.profiles
    likeness = coordinator.state.reputation.likeness
    voices = {device: likeness.voice(profiles[device].name) for device in IDS[:3]}
    assert voices == {"id-0": 0.5, "id-1": 0.5, "id-2": 1.0}
    weight = coordinator.state.reputation.weight(profiles["id-0"].name)
    assert weight <= 0.5


def test_with_the_servers_examples_a_run_goes_on_bit_for_bit():
    def made():
        return make_coordinator(reputation=True, own_examples=OwnExamples())

    whole, first = made(), made()
    for server_round in range(1, 7):
        _, expected, _ = one_round(whole, server_round, lambda p: pulling(p, "id-1"))
        if server_round in (2, 3, 5):
            snapshot = first.snapshot()
            values = json.loads(json.dumps(snapshot.values))
            first = made()
            first.restore(replace(snapshot, values=values))
            for index in range(4):
                profile = simulated_device(index, seed=1)
                first.add_device(f"id-{index}", profile.to_properties())
        _, record, _ = one_round(first, server_round, lambda p: pulling(p, "id-1"))
        assert record.blocks == expected.blocks
    for name, values in whole.values().items():
        np.testing.assert_array_equal(first.values()[name], values)
    assert to_values(first.state.reputation) == to_values(whole.state.reputation)
