"""What a coordinator knows is one frozen value: the rounds to come follow from it."""

from __future__ import annotations

import numpy as np

from lola_flwr.run.values import to_values
from lola_flwr.server.state import RunState
from lola_flwr.system.devices import simulated_device
from tests.server.coordinators import honest_reply, make_coordinator

IDS = ["id-0", "id-1", "id-2", "id-3"]


def asked(plan):
    return {device: a.to_record() for device, a in plan.assignments.items()}


def test_planning_changes_nothing():
    coordinator = make_coordinator(rotation_eps=0.5, downlink="changed")
    state = coordinator.state
    first = coordinator.plan_round(1, IDS)
    assert coordinator.state is state
    assert asked(coordinator.plan_round(1, IDS)) == asked(first)


def test_a_round_makes_the_next_state_of_the_last_which_stays_as_it_was():
    coordinator = make_coordinator(rotation_eps=0.5)
    states, plans = [coordinator.state], []
    for server_round in (1, 2, 3):
        plan = coordinator.plan_round(server_round, IDS)
        late = [honest_reply(plan, device) for device in list(plan.assignments)[1:]]
        coordinator.complete_round(plan, late)
        states.append(coordinator.state)
        plans.append(asked(plan))
    told = [to_values(state) for state in states]
    assert [values["server_round"] for values in told] == [0, 1, 2, 3]
    assert [sum(map(sum, v["meetings"].values())) for v in told] == [0, 2, 4, 6]
    # From a state of before the same rounds follow: nothing is known elsewhere.
    for server_round, (state, plan) in enumerate(zip(states, plans, strict=False), 1):
        coordinator.state = state
        assert asked(coordinator.plan_round(server_round, IDS)) == plan
    assert [to_values(state) for state in states] == told


def test_two_coordinators_of_one_state_plan_alike():
    one, other = make_coordinator(), make_coordinator(num_devices=0)
    plan = one.plan_round(1, IDS)
    one.complete_round(
        plan, [honest_reply(plan, d) for d in list(plan.assignments)[:1]]
    )
    other.state = one.state
    assert asked(other.plan_round(2, IDS)) == asked(one.plan_round(2, IDS))


def test_silent_devices_are_asked_less_often_and_it_is_part_of_the_state():
    coordinator = make_coordinator(num_devices=0)
    times = []
    for server_round in range(1, 10):
        unknown = coordinator.meet_devices(server_round, ["mute", "new"])
        if "mute" in unknown:
            times.append(server_round)
        answers = ["new"] if "new" in unknown else []
        for device in answers:
            profile = simulated_device(0, seed=1).to_properties()
            coordinator.add_device(device, profile)
        coordinator.note_answers(server_round, unknown, answers)
        # A run that is stopped after the round, and goes on.
        coordinator.state = RunState.from_values(coordinator.state.to_values())
    assert times == [1, 3, 6]
    assert coordinator.state.fleet.silent.failures("mute") == 3
    assert np.isinf(coordinator.state.fleet.silent.memory_limit(1, "new"))
