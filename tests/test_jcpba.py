"""JCPBA in the comparison: models really pruned, what that takes, and the mean."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from lola_flwr.costs.of_model import model_costs
from lola_flwr.d2ft.pruning import num_pruned
from lola_flwr.errors import UserError
from lola_flwr.model.adapters import adapt
from lola_flwr.model.backprop import model_loss
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.model.loading import load_values
from lola_flwr.system.devices import FleetRanges, simulated_device
from simulations.compare.contender import Fleet, Update, mean_of_those_that_trained
from simulations.compare.jcpba import (
    PrunedSizes,
    PruningOptions,
    jcpba,
    mean_of_rows,
    problem,
)
from simulations.compare.local_rounds import _round_cost, _values, train
from simulations.compare.methods import Method, RunSettings
from simulations.compare.pruned_model import prunable, pruned
from simulations.compare.pruning_rates import by_descent
from simulations.compare.runs import run_method
from simulations.compare.tasks import image_task

SETTINGS = RunSettings(rounds=2, eval_every=1, num_devices=3, batch_size=5, seed=1)
LORA = {"tuning": "lora", "tuning_options": {"r": 4}}
RATES_BPS = np.array([5e6, 2e6, 9e6])


@pytest.fixture(scope="module")
def plain():
    return image_task(num_devices=3, seed=1)


def adapted(task, tuning):
    options = {"r": 4} if tuning == "lora" else None
    return replace(task, model=adapt(copy.deepcopy(task.model), tuning, options))


@pytest.fixture(scope="module", params=["full", "lora"])
def task(request, plain):
    task = adapted(plain, request.param)
    for name, parameter in task.model.named_parameters():
        if ".lora_B." in name:  # zero to begin with
            torch.nn.init.normal_(parameter)
    return task


@pytest.fixture(scope="module")
def lora_fleet(plain):
    """All layers are one block here, which takes less counting."""
    task = adapted(plain, "lora")
    counted = partial(
        model_costs,
        task.model,
        task.partition,
        batch_size=5,
        sequence_length=task.sequence_length,
        merged=True,
    )
    return Fleet(
        method=Method(kind="jcpba", **LORA),
        partition=task.partition.merged(),
        costs=counted(),
        shapes={name: value.shape for name, value in _values(task).items()},
        profiles=[simulated_device(k, seed=1, ranges=FleetRanges()) for k in range(3)],
        num_examples=[task.num_examples(k) for k in range(3)],
        model=task.model,
        counted=counted,
    )


@pytest.fixture(scope="module")
def sizes(lora_fleet):
    return PrunedSizes.of(lora_fleet, PruningOptions().max_rate)


def gradients(task):
    task.model.eval()
    task.model.zero_grad()
    loss = model_loss(task.model, task.draw(0, 1, 4))
    loss.backward()
    return float(loss.detach()), {
        name: parameter.grad.clone()
        for name, parameter in task.model.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize("rate", [0.3, 0.95])
def test_a_pruned_model_is_the_whole_one_with_rows_of_zeros(task, rate):
    maps = prunable(task.model, task.partition)
    before = dict(task.model.named_parameters())
    copies = {name: value.detach().clone() for name, value in before.items()}
    with pruned(task.model, maps, rate) as rows:
        small = {name: p.shape for name, p in task.model.named_parameters()}
        loss, found = gradients(task)
    after = dict(task.model.named_parameters())
    assert all(after[name] is before[name] for name in before)
    assert not any("kept_rows" in name for name, _ in task.model.named_buffers())
    for name, kept in rows.items():
        left_out = num_pruned(len(before[name]), rate)
        assert len(kept) == len(before[name]) - left_out == small[name][0]
        with torch.no_grad():
            mask = torch.zeros(len(before[name]), dtype=torch.bool)
            mask[kept] = True
            before[name][~mask] = 0.0
    masked_loss, masked = gradients(task)
    with torch.no_grad():
        for name, value in copies.items():
            before[name].copy_(value)
    assert loss == pytest.approx(masked_loss, rel=1e-5)
    assert set(found) == set(masked)
    for name, gradient in found.items():
        expected = masked[name][rows[name]] if name in rows else masked[name]
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6)


def test_the_least_rows_hold_no_more_than_the_rate(task):
    """What the mean rate rests on: the error of pruning is at most the rate."""
    maps = prunable(task.model, task.partition)
    modules = dict(task.model.named_modules())
    for rate in (0.0, 0.01, 0.5, 0.9):
        wholes = {n: modules[n].weight.detach().numpy().copy() for n in maps.values()}
        with pruned(task.model, maps, rate) as rows:
            for name, whole in wholes.items():
                kept = rows.get(f"{name}.weight", np.arange(len(whole)))
                lost = 1 - (whole[kept] ** 2).sum() / (whole**2).sum()
                assert lost <= rate + 1e-6
        assert bool(rows) == (rate * 128 >= 1)


def test_a_map_keeps_a_row():
    assert num_pruned(2, 0.99) == num_pruned(100, 0.019) == 1
    assert num_pruned(10, 0.3) == 3  # 0.3 * 10 is below 3 in floats of some steps
    assert num_pruned(1, 0.99) == 0


@pytest.mark.parametrize("rate", [0.011, 0.37, 0.6])
def test_bytes_are_those_of_the_pruned_model(lora_fleet, sizes, rate):
    fleet, part = lora_fleet, sizes.part(rate)
    with pruned(fleet.model, prunable(fleet.model, fleet.partition), rate):
        arrays = dict(fleet.model.named_parameters())
        assert part.sent_bytes == sum(arrays[name].nbytes for name in part.names)
        shapes = {name: value.shape for name, value in arrays.items()}
    smaller = replace(fleet, shapes=shapes).part_from(0)
    assert part.around_bytes == smaller.around_bytes
    assert part.sent_bytes == smaller.sent_bytes


def test_operations_are_those_of_the_pruned_model(lora_fleet, sizes):
    fleet, part = lora_fleet, sizes.part(0.37)
    with pruned(fleet.model, prunable(fleet.model, fleet.partition), 0.37):
        (counted,) = fleet.counted().flops
    assert part.step_flops == pytest.approx(counted, rel=5e-3)
    assert sizes.part(0.6).step_flops == sizes.least.step_flops
    assert sizes.part(0.0) == fleet.part_from(0)
    steps = [sizes.part(rate).step_flops for rate in (0.0, 0.011, 0.3, 0.37, 0.6)]
    assert steps == sorted(steps, reverse=True)


def test_rounds_take_what_the_plan_says(lora_fleet, sizes):
    fleet, options = lora_fleet, PruningOptions()
    plan = by_descent(problem(fleet, sizes, options, RATES_BPS))
    parts = jcpba(fleet).parts(1, RATES_BPS)
    assert [part.pruning_rate for part in parts.values()] == plan.rates.tolist()
    spent = _round_cost(fleet, RATES_BPS, parts, parts)
    # No more is left out than whole rows.
    assert plan.round_s * (1 - 1e-6) <= spent.seconds <= 1.02 * plan.round_s
    # Who holds more examples prunes less of the mean.
    unlike = replace(fleet, num_examples=[1, 1, 98])
    rates = by_descent(problem(unlike, sizes, options, RATES_BPS)).rates
    assert rates @ np.array([0.01, 0.01, 0.98]) <= options.mean_rate * (1 + 1e-12)


def test_a_row_is_averaged_over_those_that_trained_it(rng):
    values = {n: rng.normal(size=s).astype("f4") for n, s in (("a", (4, 2)), ("b", 3))}
    ones = {"a": rng.normal(size=(2, 2)).astype("f4"), "b": values["b"] + 1}
    others = {"a": rng.normal(size=(3, 2)).astype("f4"), "b": values["b"] + 3}
    updates = {
        0: Update(ones, 3, {"a": np.array([0, 2])}),
        1: Update(others, 1, {"a": np.array([0, 1, 2])}),
    }
    mean = mean_of_rows(values, updates)
    for row, expected in enumerate(
        [
            (3 * ones["a"][0] + others["a"][0]) / 4,
            others["a"][1],
            (3 * ones["a"][1] + others["a"][2]) / 4,
            values["a"][3],
        ]
    ):
        np.testing.assert_allclose(mean["a"][row], expected, rtol=1e-6)
    np.testing.assert_allclose(mean["b"], values["b"] + 1.5, rtol=1e-6)
    whole = {k: Update({"a": values["a"] * k, "b": ones["b"]}, k) for k in (1, 2)}
    usual, here = mean_of_those_that_trained(values, whole), mean_of_rows(values, whole)
    for name in values:
        np.testing.assert_allclose(here[name], usual[name], rtol=1e-6)


def test_what_is_pruned_is_neither_trained_nor_sent(task):
    maps, names = prunable(task.model, task.partition), task.partition.trainable
    before = _values(task)
    with pruned(task.model, maps, 0.5) as rows:
        sent = train(task.model, names, [task.draw(0, 1, 4)], 1e-2, 0)
    after = mean_of_rows(before, {0: Update(sent, 1, rows)})
    assert set(rows) & set(names)
    for name in names:
        changed = (after[name] != before[name]).reshape(len(before[name]), -1).any(1)
        kept = rows.get(name, np.arange(len(before[name])))
        assert not np.delete(changed, kept).any()
        assert changed[kept].any()
    load_values(task.model, list(before), list(before.values()))


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["descent", "joint"])
def test_rounds_are_shorter_and_lighter_than_fedavgs(solver):
    def last(**fields):
        task = image_task(num_devices=3, seed=1)
        method = Method(**{**LORA, **fields})
        return run_method(task, method, SETTINGS, lambda _: None)[-1]

    whole = last(kind="fedavg")
    pruned = last(kind="jcpba", pruning={"solver": solver})
    for field in ("wireless_s", "joules", "payload_bytes", "flops"):
        assert 0 < getattr(pruned, field) < getattr(whole, field)
    # Without pruning it is FedAvg.
    same = last(kind="jcpba", pruning={"mean_rate": 0.0})
    assert same.metrics == pytest.approx(whole.metrics, abs=1e-4)
    assert same.wireless_s == pytest.approx(whole.wireless_s)
    assert same.payload_bytes == whole.payload_bytes


@pytest.mark.parametrize(
    ("pruning", "said"),
    [
        ({"rate": 0.5}, "pruning has no option 'rate'; it has mean_rate, max_rate, "),
        ({"solver": "grid"}, "solver='grid' of pruning must be one of descent, joint"),
        ({"mean_rate": 0.7}, "mean_rate=0.7 of pruning must be .* max_rate=0.6 no"),
        ({"max_rate": 1.0}, "and both below 1"),
        ({"mean_rate": 0.0, "max_rate": 0.0}, "no less and above 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(pruning, said):
    with pytest.raises(UserError, match=said) as refused:
        PruningOptions.of(pruning)
    assert "\n" not in str(refused.value)


def test_what_cannot_be_pruned_is_refused(lora_fleet):
    method = replace(lora_fleet.method, tuning="ia3")
    with pytest.raises(UserError, match="under tuning = full or lora; got 'ia3'"):
        jcpba(replace(lora_fleet, method=method))
    model = torch.nn.Sequential(torch.nn.Conv1d(1, 1, 1))
    dora = ("0.lora_A.default.weight", "0.lora_magnitude_vector.default.weight")
    with pytest.raises(UserError, match=r"0.lora_magnitude_vector.* not of plain LoRA"):
        prunable(model, BlockPartition((dora,), (), ()))
    with pytest.raises(UserError, match="No layer has a linear map"):
        prunable(model, BlockPartition((("0.weight",),), (), ()))
