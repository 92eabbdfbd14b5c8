"""The attack bench under D2FT: hostile devices that hold parts of the model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lola_flwr.server.spread.exchange import LARGEST_VALUE
from lola_flwr.wire.records import PartReport, PartTask
from simulations.attacks import spread
from simulations.attacks.__main__ import ATTACKS, attacks_of
from simulations.attacks.attack import D2FT, PartTurn
from simulations.attacks.parts import PART_ATTACKS
from simulations.attacks.scenario import Scenario
from simulations.attacks.spread import run

ARRAYS = {
    "inputs": {"hidden": np.float32, "masks": np.uint8},
    "forward": {"hidden": np.float32},
    "backward": {"slopes": np.float32, "gradients": np.float32},
    "loss": {"slopes": np.float32, "gradients": np.float32},
    "return": {"values": np.float32, "moments": np.float32},
}
RUN = Scenario(method="d2ft", rounds=6, batch_size=4, own_examples=0, share=0.3)
SHORT = replace(RUN, num_devices=3, rounds=2)


def turn(kind):
    task = PartTask(kind=kind, step=1, base_fingerprint="", seed=0, num_groups=2)
    return PartTurn(device="id-1", task=task, seed=0)


def answers(kind):
    drawn = np.random.default_rng(0)
    squares = np.ones(2).tobytes() if kind == "backward" else b""
    return PartReport(kind=kind, step=1, squares=squares), {
        name: (10 * drawn.random(6)).astype(dtype)
        for name, dtype in ARRAYS[kind].items()
    }


def changed_by(attack):
    """What an attack changes, as ``kind name``; ``kind`` alone: what it reports."""
    changed = set()
    for kind in ARRAYS:
        report, arrays = answers(kind)
        said, sent = attack.part((report, arrays), turn(kind))
        assert sent.keys() == arrays.keys()
        for name, array in arrays.items():
            assert (sent[name].dtype, sent[name].shape) == (array.dtype, array.shape)
            if not np.array_equal(sent[name], array):
                changed.add(f"{kind} {name}")
        if said != report:
            changed.add(kind)
    return changed


def test_what_each_attack_changes():
    forward, values = {"forward hidden"}, {"return values"}
    slopes = {"backward slopes", "loss slopes"}
    gradients = {*slopes, "backward gradients", "loss gradients"}
    everything = {"inputs hidden", *forward, *gradients, *values}
    assert {attack.name: changed_by(attack) for attack in PART_ATTACKS} == {
        "contributions turned round": forward,
        "contributions, 9.9 times": forward,
        "contributions of noise, 9 times": forward,
        "hidden states' gradients turned round": slopes,
        "hidden states' gradients turned round, 9.9 times": slopes,
        "losses' gradients turned round, 1.9 times": {
            "loss slopes",
            "loss gradients",
        },
        "all gradients turned round, 9.9 times": gradients,
        "returned values turned round": values,
        "returned values far off": values,
        "sub-networks trained the wrong way": {
            "backward slopes",
            "backward gradients",
        },
        "claims a huge gradient": {"backward"},
        "parts of zeros": everything,
        "parts of 3e38": everything,
        "claims to be fastest, contributions turned round": forward,
        "late sybils, contributions turned round": forward,
    }


def test_how_large_what_is_sent_is():
    _, honest = answers("forward")
    _, noise = ATTACKS["contributions of noise, 9 times"].part(
        answers("forward"), turn("forward")
    )
    length = np.linalg.norm(honest["hidden"])
    assert np.linalg.norm(noise["hidden"]) == pytest.approx(9 * length, rel=1e-5)
    _, values = ATTACKS["returned values far off"].part(
        answers("return"), turn("return")
    )
    assert abs(values["values"]).min() > 0.8 * LARGEST_VALUE
    assert abs(values["values"]).max() <= LARGEST_VALUE


def test_who_sends_what_no_model_has_costs_its_steps_and_rests():
    came = run(SHORT, ATTACKS["parts of 3e38"])
    # In the second step it rests.
    assert (came.found, came.found_after) == (1.0, 1)
    assert came.honest_refused == 0.5, "what was honest in the first is lost, too"
    assert came.honest_distrusted == 0


@pytest.mark.slow
def test_a_device_that_trains_the_wrong_way_answers_as_an_honest_one(monkeypatch):
    """Within a step: until it returns its values, or computes with them."""
    reply = spread._Devices._reply
    seen = []

    def told(devices, device, request):
        found = reply(devices, device, request)
        seen.append((device, request.task.kind, found.arrays, found.report))
        return found

    monkeypatch.setattr(spread._Devices, "_reply", told)

    def replies(attack):
        seen.clear()
        run(replace(SHORT, rounds=1), ATTACKS[attack])
        return [*seen]

    honest, hostile = replies("none"), replies("sub-networks trained the wrong way")
    differ = [h != a for h, a in zip(honest, hostile, strict=True)]
    assert any(differ)
    assert {one[1] for one, d in zip(honest, differ, strict=True) if d} == {"return"}
    assert len({one[0] for one, d in zip(honest, differ, strict=True) if d}) == 1


@pytest.mark.slow
def test_who_is_not_there_costs_nothing():
    came = run(RUN, ATTACKS["not there"])
    assert (came.found, came.found_after, came.honest_refused) == (0.0, None, 0.0)


@pytest.mark.slow
def test_hostile_devices_that_do_as_the_others_change_nothing():
    honest = run(replace(RUN, share=0.0), ATTACKS["none"])
    assert run(RUN, ATTACKS["none"]) == honest


@pytest.mark.slow
def test_every_attack_runs_against_the_server_as_it_is():
    attacks = attacks_of(D2FT)
    assert len(attacks) > 12
    for attack in attacks:
        came = run(replace(RUN, num_devices=6, rounds=4), attack)
        assert 0.3 < came.accuracy < 0.8
        assert 0 <= came.honest_refused <= 1
