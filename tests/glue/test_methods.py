from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lola_flwr.app.d2ft import schedules_of
from lola_flwr.app.methods import (
    limits_of,
    low_rank_of,
    num_own_examples,
    own_examples_of,
    response_of,
    selection_of,
    settings_of,
    zeroth_order_of,
)
from lola_flwr.d2ft.schedule import Budgets
from lola_flwr.d2ft.steps import StepSchedules
from lola_flwr.deployment.app_code import DeviceContext
from lola_flwr.device.sampling import ChosenBatches
from lola_flwr.errors import UserError
from lola_flwr.model.backprop import block_gradient
from lola_flwr.model.example_losses import EXAMPLE_ROWS
from lola_flwr.server.norm_limits import NormLimits
from lola_flwr.server.selection import BoundedStaleness, Lisa
from lola_flwr.wire.low_rank import LowRankProjection
from lola_glue.config import GlueConfig
from lola_glue.costs import load_model, model_blocks, model_costs
from lola_glue.device import device_fn
from lola_glue.tasks import find_task
from simulations.figures.learning import app_config
from tests.marks import rest_slow


def config(**changes):
    changes = {name.replace("_", "-"): value for name, value in changes.items()}
    return GlueConfig.from_run_config(
        {**app_config(), "model": "random:roberta-tiny", **changes}
    )


@pytest.fixture(scope="module")
def tiny():
    model, _ = load_model(config(), find_task("acceptability"))
    return model, model_blocks(config(), model)


def test_the_model_is_the_tasks():
    for name in ("wnli", "sts-b"):
        task = find_task(name)
        model, tokenizer = load_model(config(task=name, max_length=24), task)
        assert model.config.num_labels == task.num_labels
        names = task.class_names or ("LABEL_0",)
        assert model.config.id2label == dict(enumerate(names))
        assert tokenizer.model_max_length == 24
    with pytest.raises(UserError, match="max-length=130 exceeds the 129 positions"):
        load_model(config(max_length=130), task)


def test_by_default_every_block_is_trained_by_back_propagation(tiny):
    assert selection_of(config(), *tiny).takes_all
    assert zeroth_order_of(config(), *tiny) is None


@pytest.mark.parametrize("method", ["lola-deft", "d2ft"])
def test_what_is_too_long_is_configured_for_owners_losses_too(method):
    changes = {"method": method, "max_gradient_norm": 2.0}
    assert limits_of(config(**changes)) == NormLimits(2.0, 3.0)
    assert limits_of(config(norm_factor=4.0, **changes)) == NormLimits(2.0, 4.0)
    assert limits_of(config(norm_factor=0.0, **changes)) == NormLimits(2.0, math.inf)


def test_selector_and_target_are_those_of_the_configuration(tiny):
    selection = selection_of(
        config(
            selector="lisa",
            selector_options="count=2, period=3, max_staleness=9",
            latency_target_s=1.5,
            block_value="equal",
        ),
        *tiny,
    )
    assert selection.selector == BoundedStaleness(Lisa(2, period=3), 9)
    assert (selection.latency_target_s, selection.value) == (1.5, "equal")
    assert math.isinf(selection_of(config(selector="all"), *tiny).latency_target_s)


@pytest.mark.parametrize("sampler", rest_slow(["entropy", "coreset"], 0))
def test_a_samplers_pool_counts(tiny, sampler):
    model, _ = tiny
    plain, chosen = (
        model_costs(config(sampler=name), model).flops for name in ("random", sampler)
    )
    # Training the last block takes a forward pass through all layers, and more.
    pool = chosen - plain
    assert np.ptp(pool) == pytest.approx(0, abs=1e-6 * pool[0])
    assert plain[-1] < pool[0] < 2 * plain[-1]
    context = DeviceContext(
        run_id=1,
        node_id=1,
        node_config={"partition-id": 0, "num-partitions": 2},
        run_config={**app_config(), "model": "random:roberta-tiny", "sampler": sampler},
    )
    device = device_fn(context)
    device.load_model()
    assert len(device.batch_source(1, 4)["labels"]) == 4
    assert isinstance(device.batch_source, ChosenBatches)


@pytest.mark.slow
def test_a_larger_pool_costs_more(tiny):
    model, _ = tiny
    costs = [
        model_costs(
            config(sampler="entropy", sampler_options=f"pool_factor={factor}"), model
        )
        for factor in (2, 4)
    ]
    plain = model_costs(config(), model).flops
    np.testing.assert_allclose(costs[1].flops - plain, 2 * (costs[0].flops - plain))


@pytest.mark.parametrize("options", rest_slow(["", "weighted=true, measure='loss'"]))
def test_a_history_costs_nothing_and_is_kept(tiny, tmp_path, monkeypatch, options):
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    model, partition = tiny
    chosen = {"sampler": "history", "sampler_options": options}
    np.testing.assert_array_equal(
        model_costs(config(**chosen), model).flops, model_costs(config(), model).flops
    )
    context = DeviceContext(
        run_id=7,
        node_id=1,
        node_config={"partition-id": 0, "num-partitions": 2},
        run_config=config(**chosen).to_run_config(),
    )
    device = device_fn(context)
    batch = device.batch_source(1, 4)
    block_gradient(
        model,
        partition,
        1,
        batch,
        loss_function=device.followed_loss,
        micro_batch_size=2,
    )
    # Another process goes on with what this one has seen.
    seen = device_fn(context).batch_source.seen().sums
    rows, times = np.unique(batch[EXAMPLE_ROWS], return_counts=True)
    np.testing.assert_array_equal(seen[0][rows], times)
    assert seen[0].sum() == 4


def test_samplers_that_make_no_sense():
    with pytest.raises(UserError, match=r"sampler-options: .*no option 'heat'"):
        config(sampler="entropy", sampler_options="heat=3")
    with pytest.raises(UserError, match=r"mean nothing with sampler=\"random\""):
        config(sampler_options="temperature=0.1")
    with pytest.raises(UserError, match=r"task='sts-b' has scores"):
        config(sampler="history", task="sts-b")
    with pytest.raises(UserError, match=r"task='sts-b' has scores"):
        config(sampler="entropy", task="sts-b")
    with pytest.raises(UserError, match=r"does not go with zeroth-order='always'"):
        config(sampler="coreset", zeroth_order="always")


def test_layers_that_run_in_part_keep_their_activations(tiny):
    with pytest.raises(UserError, match=r'activations="exact"'):
        settings_of(config(activations="int8", reduced_schedules=True), *tiny)
    with pytest.raises(UserError, match="activations"):
        config(activations="int8", method="d2ft")


@pytest.mark.slow
def test_activations_in_8_bits_are_counted(tiny):
    model, _ = tiny
    exact, int8 = (
        model_costs(config(activations=way), model).memory_bytes
        for way in ("exact", "int8")
    )
    assert (int8 < exact).all()


@pytest.mark.slow
def test_derivatives_along_directions_are_counted(tiny):
    options = "num_directions=4, perturbation={}"
    moved, derived = (
        zeroth_order_of(
            config(zeroth_order="always", zeroth_order_options=options.format(step)),
            *tiny,
        )
        for step in (1e-3, 0)
    )
    assert np.ptp(moved.costs.flops) == 0
    assert (np.diff(derived.costs.flops) < 0).all()
    fields = derived.directions_for(0, 1, "device")
    assert fields["perturbation"] == 0


def test_zeroth_order_options(tiny):
    settings = zeroth_order_of(
        config(
            zeroth_order="fallback",
            zeroth_order_options="lr=1e-4, num_directions=8",
            batch_size=4,
        ),
        *tiny,
    )
    assert (settings.use, settings.lr, settings.num_directions) == ("fallback", 1e-4, 8)
    # Of one number each, beside what a message takes for itself.
    assert 8 * 8 * 4 < settings.costs.payload_bits[0] < 8 * 2000
    with pytest.raises(UserError, match=r"zeroth-order-options: .*steps"):
        zeroth_order_of(
            config(zeroth_order="always", zeroth_order_options="steps=3"), *tiny
        )


def test_ranks(tiny):
    ranks = [
        settings_of(config(**own), *tiny).transfer.rank
        for own in ({}, {"rank": 4}, {"rank": "auto"})
    ]
    assert ranks == [None, 4, "auto"]
    with pytest.raises(UserError, match=r"rank=1.5 must be a whole number, at least 0"):
        config(rank=1.5)
    with pytest.raises(UserError, match=r'rank=2 means nothing with method="fedavg'):
        config(rank=2, method="fedavg-full")
    with pytest.raises(UserError, match=r"zeroth-order|zeroth_order"):
        settings_of(config(rank=2, zeroth_order="always"), *tiny)


def test_low_rank_options():
    assert low_rank_of(config()) is None
    projection = low_rank_of(config(low_rank="rank=8, period=2", seed=4))
    assert projection == LowRankProjection(rank=8, period=2, seed=4)
    with pytest.raises(UserError, match=r"low-rank='ranks=8': .*ranks"):
        low_rank_of(config(low_rank="ranks=8"))


def test_the_response_is_the_loss_on_the_servers_own_examples(tiny):
    model, partition = tiny
    seen = []

    def mean_loss(drawn):
        seen.append(drawn)
        return next(iter(model.parameters())).sum().item()

    assert response_of(config(), model, partition, 50, mean_loss) is None
    chosen = config(selector="ist", selector_options="count=1", proxy_examples=8)
    response = response_of(chosen, model, partition, 50, mean_loss)
    parameters = dict(model.named_parameters())
    values = {n: parameters[n].detach().numpy().copy() for n in partition.trainable}
    response({name: array + 1 for name, array in values.items()})
    (proxy,) = seen
    assert len(proxy) == len(set(proxy)) == 8
    assert set(proxy) < set(range(50))
    name = partition.trainable[0]
    np.testing.assert_array_equal(parameters[name].detach(), values[name] + 1)


def test_the_servers_own_examples_are_some_of_the_training_examples(tiny):
    model, partition = tiny
    seen = []

    def batch_of(numbers):
        seen.append([*numbers])
        ids = torch.tensor([[5, 6, 7 + number] for number in numbers])
        return {"input_ids": ids, "labels": torch.tensor(numbers) % 2}

    assert own_examples_of(config(own_examples=0), *tiny, 50, batch_of) is None
    gradients = own_examples_of(config(own_examples=6), *tiny, 50, batch_of)
    assert not seen
    parameters = dict(model.named_parameters())
    values = {n: parameters[n].detach().numpy().copy() for n in partition.trainable}
    assert gradients.count == 6
    found = gradients(values, np.arange(6), dict.fromkeys(values))
    assert {*found} == {*partition.trainable}
    assert {len(rows) for rows in found.values()} == {6}
    (drawn,) = (numbers for numbers in seen if len(numbers) == 6)
    assert len({*drawn}) == 6
    assert {*drawn} < {*range(50)}
    few = own_examples_of(config(), *tiny, 50, batch_of)
    assert few.count == 50


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({}, 64),
        ({"method": "fedavg-full"}, 64),
        ({"own_examples": 0}, 0),
        ({"own_examples": 9, "low_rank": "rank=4"}, 9),
        ({"low_rank": "rank=4"}, 0),
        ({"reputation": False}, 0),
        ({"zeroth_order": "always"}, 64),
    ],
)
def test_by_default_the_server_has_examples_where_gradients_can_be_compared(
    changes, count
):
    assert num_own_examples(config(**changes)) == count


def test_the_number_of_own_examples_is_one_or_auto():
    assert config(own_examples="auto") == config()
    for wrong in (-1, "many", 0.5):
        with pytest.raises(UserError, match='at least 0, or "auto"'):
            config(own_examples=wrong)


@pytest.mark.parametrize(
    "changes",
    [
        {"selector": "lissa"},
        {"latency_target_s": -1.0},
        {"method": "fedavg-full", "selector": "lisa", "selector_options": "count=1"},
        {"method": "fedavg-full", "zeroth_order": "always"},
        {"participation": "all", "latency_target_s": 2.0},
    ],
)
def test_keys_that_make_no_sense(changes):
    with pytest.raises(UserError, match=r"selector|latency-target-s|zeroth-order"):
        config(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"interface": "legacy"}, "interface"),
        ({"codec": "bf16"}, 'codec="bf16" means nothing'),
        ({"sampler": "entropy"}, 'sampler="entropy" means nothing'),
        ({"block_mean": "median"}, "block-mean"),
        ({"backups": 1}, "backups=1 means nothing"),
        ({"low_rank": "rank=2"}, "low-rank"),
        ({"method": "lola-deft"}, 'd2ft-options="compute=0.6" means nothing'),
    ],
)
def test_keys_that_d2ft_has_no_use_for(changes, message):
    usual = {"method": "d2ft", "d2ft_options": "compute=0.6"}
    assert config(**usual)
    with pytest.raises(UserError, match=message):
        config(**{**usual, **changes})


def test_d2ft_s_options_are_those_of_its_schedules():
    options = "compute=0.6, micro_batches=7, num_groups=4, same_micro_batches=false"
    options += ", audit_share=0.25, audit_seed=3"
    schedules, num_groups = schedules_of(config(method="d2ft", d2ft_options=options))
    assert schedules == StepSchedules(
        micro_batches=7,
        budgets=Budgets(compute=0.6),
        same_micro_batches=False,
        audit_share=0.25,
        audit_seed=3,
    )
    assert num_groups == 4
    for wrong in (
        "compute=1.5",
        "micro_batches=2.5",
        "shared_budgets=1",
        "magic=1",
        "audit_share=1.5",
    ):
        with pytest.raises(UserError, match=wrong.split("=")[0]):
            schedules_of(config(method="d2ft", d2ft_options=wrong))
