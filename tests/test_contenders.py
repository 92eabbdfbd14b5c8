"""Methods of local training in the comparison: what they train, average and take."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lola_flwr.errors import UserError
from lola_flwr.model.adapters import adapt
from lola_flwr.model.loading import load_values
from lola_flwr.wire.codec import codec_named
from simulations.compare.contender import (
    Update,
    as_received,
    mean_of_those_that_trained,
)
from simulations.compare.depth_limited import first_blocks
from simulations.compare.flexlora import (
    decomposed,
    device_ranks,
    flexlora,
    merged,
    truncated,
)
from simulations.compare.local_rounds import (
    CONTENDERS,
    _fleet,
    _round_cost,
    _values,
    train,
)
from simulations.compare.methods import Method, RunSettings
from simulations.compare.runs import run_method
from simulations.compare.tasks import image_task

SETTINGS = RunSettings(rounds=2, eval_every=1, num_devices=4, batch_size=5, seed=1)
RATES_BPS = np.full(4, 5e7)
LORA = {"tuning": "lora", "tuning_options": {"r": 4}, "ranks": (4, 2)}


@pytest.fixture(scope="module")
def lora():
    task = image_task(num_devices=4, seed=1)
    return replace(task, model=adapt(task.model, "lora", {"r": 4}))


def points(method, settings=SETTINGS):
    task = image_task(num_devices=settings.num_devices, seed=1)
    return run_method(task, method, settings, lambda _: None)


@pytest.mark.slow
def test_one_step_of_one_device_is_fedavg_of_gradients():
    """The round's time, energy and bytes are the coordinator's, as what is learned."""
    settings = replace(SETTINGS, num_devices=1)
    local = points(Method(kind="fedavg", local_steps=1), settings)[0]
    served = points(Method(kind="fedavg-full"), settings)[0]
    assert local.metrics == pytest.approx(served.metrics, abs=1e-4)
    # But for what is around the array in a file of it.
    assert 0 <= served.payload_bytes - local.payload_bytes < 2000
    assert local.wireless_s == pytest.approx(served.wireless_s, rel=1e-3)
    assert local.joules == pytest.approx(served.joules, rel=1e-3)


@pytest.mark.slow
def test_time_and_energy_of_many_devices_are_the_coordinators():
    local = points(Method(kind="fedavg", local_steps=1))
    served = points(Method(kind="fedavg-full"))
    for mine, theirs in zip(local, served, strict=True):
        assert mine.wireless_s == pytest.approx(theirs.wireless_s, rel=1e-2)
        assert mine.joules == pytest.approx(theirs.joules, rel=1e-2)


def test_a_mean_is_over_those_that_trained(rng):
    values = {name: rng.normal(size=3).astype(np.float32) for name in "abc"}
    ones = {name: rng.normal(size=3).astype(np.float32) for name in "ab"}
    others = {"b": rng.normal(size=3).astype(np.float32)}
    mean = mean_of_those_that_trained(
        values, {0: Update(ones, 3), 5: Update(others, 1)}
    )
    np.testing.assert_allclose(mean["a"], ones["a"], rtol=1e-6)
    np.testing.assert_allclose(mean["b"], (3 * ones["b"] + others["b"]) / 4, rtol=1e-6)
    assert mean["c"] is values["c"]


def test_factors_are_those_of_the_whole_products_decomposition(rng):
    a, b = rng.normal(size=(6, 11)), rng.normal(size=(9, 6))
    found_a, found_b = decomposed(a.astype("f4"), b.astype("f4"), 4)
    u, singular, vt = np.linalg.svd(b @ a)
    for rank in (1, 2, 4):
        best = (u[:, :rank] * singular[:rank]) @ vt[:rank]
        np.testing.assert_allclose(
            found_b[:, :rank] @ found_a[:rank], best, atol=1e-4 * singular[0]
        )


def test_flexlora_averages_products_not_factors(lora, rng):
    values = _values(lora)
    first = next(name for name in values if ".lora_A." in name)
    other = first.replace(".lora_A.", ".lora_B.")
    updates, product = {}, 0.0
    for device, (count, rank) in enumerate([(3, 4), (1, 2)]):
        drawn = {n: rng.normal(size=v.shape).astype("f4") for n, v in values.items()}
        drawn = truncated(drawn, rank)
        assert np.linalg.matrix_rank(drawn[other] @ drawn[first]) == rank
        updates[device] = Update(drawn, count)
        product = product + count / 4 * (drawn[other] @ drawn[first])
    mean = merged(values, updates, rank=4)
    u, singular, vt = np.linalg.svd(product)
    best = (u[:, :4] * singular[:4]) @ vt[:4]
    np.testing.assert_allclose(mean[other] @ mean[first], best, atol=1e-3)
    rest = next(name for name in values if "lora" not in name)
    expected = (3 * updates[0].values[rest] + updates[1].values[rest]) / 4
    np.testing.assert_allclose(mean[rest], expected, rtol=1e-5)


@pytest.mark.slow
def test_a_device_of_lower_rank_trains_and_sends_that(lora):
    method = Method(kind="flexlora", **LORA)
    fleet = _fleet(lora, method, SETTINGS)
    ranks = device_ranks(fleet)
    assert sorted(ranks) == [2, 2, 4, 4]
    speeds = [profile.flops_per_s for profile in fleet.profiles]
    assert ranks[int(np.argmax(speeds))] == 4 > ranks[int(np.argmin(speeds))]
    contender = flexlora(fleet)
    parts = contender.parts(1, RATES_BPS)
    low, high = ranks.index(2), ranks.index(4)
    adapters = sum(4 * v.size for n, v in _values(lora).items() if ".lora_" in n)
    assert parts[high].sent_bytes - parts[low].sent_bytes == adapters / 2
    begin = contender.given(low, _values(lora))
    load_values(lora.model, list(begin), list(begin.values()))
    batches = [lora.draw(low, step, 5) for step in (1, 2)]
    ends = train(lora.model, parts[low].names, batches, 1e-2, 0)
    for name, value in ends.items():
        if ".lora_A." in name:
            assert not value[2:].any()
            assert value[:2].any()
        if ".lora_B." in name:
            assert not value[:, 2:].any()
            assert value[:, :2].any()


@pytest.mark.slow
def test_devices_train_as_deep_as_the_median_trains_all():
    fleet = _fleet(
        image_task(num_devices=6, seed=1), Method(), replace(SETTINGS, num_devices=6)
    )
    firsts = first_blocks(fleet)
    order = np.argsort([profile.flops_per_s for profile in fleet.profiles])
    assert [firsts[k] for k in order] == sorted(firsts, reverse=True)
    assert firsts[order[0]] > 0 == firsts[order[-1]]
    # One that can hold no more than the last block's step trains that.
    last = fleet.partition.num_blocks - 1
    short = [replace(p, memory_bytes=1e6) for p in fleet.profiles]
    assert first_blocks(replace(fleet, profiles=short)) == [last] * 6


@pytest.mark.slow
def test_blocks_and_devices_take_turns():
    fleet = _fleet(
        image_task(num_devices=3, seed=1), Method(), replace(SETTINGS, num_devices=3)
    )
    blocks = [set(block) for block in fleet.partition.blocks]

    def trained(part):
        (block,) = [k for k, names in enumerate(blocks) if names <= {*part.names}]
        assert {*part.names} == blocks[block] | {*fleet.partition.head}
        return block

    turns = CONTENDERS["one-block-in-turn"](fleet)
    seen = [
        [(d, trained(p)) for d, p in turns.parts(r, RATES_BPS).items()]
        for r in range(1, 6)
    ]
    assert seen == [[(0, 0)], [(1, 1)], [(2, 2)], [(0, 3)], [(1, 0)]]
    each = CONTENDERS["a-block-each"](fleet)
    seen = [[trained(p) for p in each.parts(r, RATES_BPS).values()] for r in (1, 2)]
    assert seen == [[0, 1, 2], [1, 2, 3]]


@pytest.mark.slow
def test_uploads_beside_the_next_computation_take_no_longer():
    fleet = _fleet(image_task(num_devices=4, seed=1), Method(), SETTINGS)
    parts = CONTENDERS["a-block-each"](fleet).parts(1, RATES_BPS)
    plain = _round_cost(fleet, RATES_BPS, parts, parts)
    beside = _round_cost(fleet, RATES_BPS, parts, dict(parts))
    alone = _round_cost(fleet, RATES_BPS, parts, {})
    sending = _round_cost(fleet, RATES_BPS, {}, parts)
    assert beside.seconds == pytest.approx(max(alone.seconds, sending.seconds))
    assert beside.seconds < plain.seconds <= alone.seconds + sending.seconds


@pytest.mark.slow
def test_a_value_that_is_uploaded_late_is_a_round_old():
    late = points(Method(kind="a-block-each", overlaps=True))
    usual = points(Method(kind="a-block-each"))
    # After two rounds the server has what it otherwise has after one.
    assert late[1].metrics == usual[0].metrics
    assert late[1].payload_bytes == usual[0].payload_bytes
    assert late[1].wireless_s < usual[1].wireless_s


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fedavg", "one-block-in-turn"])
def test_changes_in_8_bits_take_a_quarter_of_the_bytes(kind):
    settings = replace(SETTINGS, rounds=1)
    whole = points(Method(kind=kind), settings)[0]
    coded = points(Method(kind=kind, codec="int8"), settings)[0]
    assert 0.25 < coded.payload_bytes / whole.payload_bytes < 0.28
    assert coded.wireless_s < whole.wireless_s
    assert coded.metrics["loss"] == pytest.approx(whole.metrics["loss"], rel=1e-2)


def test_what_a_codec_leaves_out_is_small_beside_the_change(rng):
    given = {"w": rng.normal(size=(4, 64)).astype(np.float32)}
    change = 1e-3 * rng.normal(size=(4, 64)).astype(np.float32)
    update = Update({"w": given["w"] + change}, 7, {"w": np.arange(4)})
    read = as_received(update, given, codec_named("int8"))
    assert read.num_examples == 7 and read.rows is update.rows
    error = read.values["w"] - update.values["w"]
    assert 0 < np.abs(error).max() < 0.01 * np.abs(change).max()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fedavg", "flexlora", "depth-limited"])
def test_lora_contenders_run(kind):
    ours = points(Method(**{**LORA, "kind": "lola"}))[-1]
    theirs = points(Method(kind=kind, **LORA))[-1]
    assert theirs.payload_bytes > ours.payload_bytes
    assert theirs.memory_bytes > 0 < theirs.joules


def test_what_makes_no_sense_is_refused(lora):
    task = image_task(num_devices=4, seed=1)
    with pytest.raises(UserError, match="kind = 'fedsgd' is none of lola, "):
        run_method(task, Method(kind="fedsgd"), SETTINGS, lambda _: None)
    whole = _fleet(task, Method(), SETTINGS)
    with pytest.raises(UserError, match='add tuning = "lora"'):
        device_ranks(whole)
    adapted = _fleet(lora, Method(), SETTINGS)
    for kind in ("flexlora", "jcpba"):
        with pytest.raises(UserError, match=f"codec = 'int8' of {kind}: .* fp32 alone"):
            CONTENDERS[kind](replace(adapted, method=Method(kind=kind, codec="int8")))
    for ranks in ((), (8, 4), (4, 0)):
        with pytest.raises(UserError, match=r"ranks = \[.*at least 1, and the largest"):
            device_ranks(replace(adapted, method=Method(ranks=ranks)))
