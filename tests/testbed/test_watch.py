"""What a soak says of memory: growth with time is told from what befell a program."""

from __future__ import annotations

import pytest

from simulations.testbed.soak import Fault, longest_lived, table
from simulations.testbed.watch import growth


def samples(rounds=120, slope=0.0, steps=(), files=7, rng=None):
    """Return a process's samples, two a round; a step is a round and its bytes."""
    noise = (lambda: 0.0) if rng is None else (lambda: float(rng.normal(0, 1e3)))
    return [
        (r, 1e8 + slope * r + sum(b for at, b in steps if r >= at) + noise(), files)
        for r in range(rounds)
        for _ in range(2)
    ]


def test_a_slope_is_found_beneath_noise(rng):
    grown = growth(samples(slope=5e3, rng=rng))
    assert grown.bytes_a_round == pytest.approx(5e3, abs=300)
    assert grown.files_a_round == grown.bytes_by_faults == 0
    assert grown.num_rounds == 99  # of 120, without the first 20


def test_a_step_by_a_fault_is_no_slope():
    steps = [(60, 18e6), (90, 18e6)]
    grown = growth(samples(slope=2e3, steps=steps), [range(60, 66), range(90, 96)])
    assert grown.bytes_a_round == pytest.approx(2e3)
    # Over both faults, each of which hides seven rounds of the slope.
    assert grown.bytes_by_faults == pytest.approx(36e6 + 14 * 2e3)
    assert grown.num_rounds == 39 + 23 + 23
    # Unless nobody knows of it.
    assert growth(samples(steps=steps)).bytes_a_round > 1e5


def test_who_has_lived_too_short_is_not_judged():
    assert growth([]) is None
    assert growth(samples(rounds=60)) is None
    assert growth(samples(rounds=61)).num_rounds == 40
    assert growth(samples(rounds=80), [range(30, 60)]) is None


def test_faults_strike_the_programs_of_their_device():
    faults = [Fault("node killed", 1, range(60, 66))]
    taken = samples(steps=[(60, 18e6)])
    by_name = longest_lived(
        {("worker-1", 5): taken, ("worker-1", 6): taken[:90], ("superlink", 7): taken},
        faults,
    )
    assert by_name["worker-1"].bytes_a_round == 0
    assert by_name["worker-1"].bytes_by_faults == 18e6
    assert by_name["superlink"].bytes_by_faults == 0
    for program in ("worker-1", "supernode-1", "supernode-1: flwr"):
        assert faults[0].strikes(program)
    for program in ("worker-11", "worker-0", "superlink"):
        assert not faults[0].strikes(program)
    # All devices start anew, and the server's own process is another one then.
    server = Fault("SuperLink killed", None, range(9))
    assert server.strikes("worker-1") and not server.strikes("run: flwr-serverapp")


@pytest.mark.parametrize(
    ("strikes", "explained"), [(1, True), (None, True), (0, False)]
)
def test_a_lost_update_is_explained_by_its_devices_fault(strikes, explained):
    block = {"device": "device-0001", "status": "no reply"}
    record = {
        "server_round": 12,
        "blocks": [block],
        "measured_round_s": 1.0,
        "measured_deadline_s": 1.0,
    }
    printed = table([record], [Fault("node killed", strikes, range(11, 20))], {}, 1)
    assert f"| node killed | 1 | {int(explained)} |" in printed
    assert f"1 lost, of which no fault explains {int(not explained)}" in printed
    assert not Fault("", 1, range(11, 20)).explains(20, "device-0001")
