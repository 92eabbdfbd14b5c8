"""What a project has set stays as it is, on the server and on the devices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord
from flwr.clientapp.mod import fixedclipping_mod
from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays
from flwr.serverapp.strategy import DifferentialPrivacyClientSideFixedClipping
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
from flwr.supercore.task_identity import TaskIdentity
from torch import nn

from lola_flwr.errors import UserError
from lola_flwr.model.exchange import names_of_list
from lola_flwr.strategies import LoLaDeft as LegacyLoLaDeft
from lola_flwr.strategies.message import LoLaDeft
from lola_flwr.wire.codec import codec_named
from tests.marks import rest_slow
from tests.strategies.projects import (
    Adapters,
    Project,
    Some,
    Whole,
    adapted,
    exchanged,
    grid_of,
    initial,
    moved,
    net,
    run,
    run_legacy,
    run_message,
)


@pytest.fixture(autouse=True)
def task(monkeypatch, tmp_path):
    """Flower makes messages only within a task."""
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))


def probe():
    """A frozen body under a head that is trained."""
    model = net()
    model.layers.requires_grad_(False)
    model.embed.requires_grad_(False)
    return model


def bits(model):
    return {n: v.detach().clone() for n, v in model.state_dict().items()}


def same(some, others):
    return all(torch.equal(some[name], others[name]) for name in others)


@pytest.mark.parametrize("legacy", rest_slow([False, True]))
def test_a_frozen_body_keeps_its_bits_and_travels_once(legacy):
    project = Project(probe, Whole())
    grid, records, arrays = run(project, legacy=legacy, rounds=3)
    assert [record.refused for record in records] == [{}, {}, {}]
    start = exchanged(project)
    statistics = {n for n in start if "running" in n or "tracked" in n}
    assert moved(start, arrays) - statistics == {"head.weight", "head.bias"}
    for model in project.seen:
        frozen = {n: p for n, p in model.named_parameters() if "head" not in n}
        assert same(frozen, {n: probe().state_dict()[n] for n in frozen})
    sizes = {name: len(_npy(values)) for name, values in start.items()}
    body = sum(sizes[n] for n in sizes if n not in statistics and "head" not in n)
    rest = sum(sizes.values()) - body
    # Three nodes, three rounds: devices hold the body from the first round on.
    assert grid.sent_bytes["train"] == 3 * (body + 3 * rest)
    # What the head has moved by travels in fp16, with an exponent of each array.
    less = sum(sizes[n] - encoded_bytes(v) for n, v in start.items() if "head" in n)
    assert grid.received_bytes["train"] == 3 * 3 * (rest - less)
    assert grid.sent_bytes["evaluate"] == 3 * 3 * rest


def test_a_device_that_can_keep_nothing_is_sent_everything(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "file"))
    project = Project(probe, Whole())
    grid, records, _ = run(project, legacy=False)
    assert [record.refused for record in records] == [{}, {}]
    whole = sum(len(_npy(values)) for values in exchanged(project).values())
    assert grid.sent_bytes == {"train": 6 * whole, "evaluate": 6 * whole, **QUERIES}


QUERIES = {"query.lola_profile": 0}


def _npy(values):
    return ArrayRecord([values])["0"].data


def encoded_bytes(values):
    """Bytes of an array's move: an exponent, and as many values."""
    return len(_npy(np.zeros(values.size + 1, np.float16)))


@pytest.mark.slow
def test_what_a_device_keeps_for_itself_is_trained_as_before():
    """FedBN: normalization layers are exchanged by nobody."""
    project = Project(net, Some("norm", has=False))
    run(project, legacy=False, rounds=1)
    for model in project.seen:
        norms = {n: v for n, v in model.state_dict().items() if "norm" in n}
        changed = moved(
            {n: net().state_dict()[n].numpy() for n in norms},
            {n: v.numpy() for n, v in norms.items()},
        )
        assert changed == {*norms}


@pytest.mark.parametrize("legacy", rest_slow([False, True], fast=0))
def test_adapters_on_a_4_bit_base(legacy):
    import bitsandbytes as bnb

    def quantised():
        model = adapted(width=64)
        for name, linear in [
            (n, m)
            for n, m in model.named_modules()
            if type(m) is nn.Linear and "layers" in n and "lora" not in n
        ]:
            four_bits = bnb.nn.Linear4bit(
                linear.in_features,
                linear.out_features,
                bias=False,
                quant_type="nf4",
                compute_dtype=torch.float32,
            )
            four_bits.load_state_dict(linear.state_dict())
            model.set_submodule(name, four_bits.to("cpu").requires_grad_(False))
        model.base_model.model.is_loaded_in_4bit = True
        return model

    project = Project(quantised, Adapters())
    grid, records, arrays = run(project, legacy=legacy, rounds=2)
    assert [record.refused for record in records] == [{}, {}]
    start = exchanged(project)
    assert all("lora" in name for name in start)
    assert moved(start, arrays) == {*start}
    adapters = sum(len(_npy(values)) for values in start.values())
    assert grid.sent_bytes["train"] == 2 * 3 * adapters
    # All nodes return all, as there are few: their moves, in fp16.
    assert grid.received_bytes["train"] == 2 * 3 * sum(
        map(encoded_bytes, start.values())
    )


def test_the_servers_model_is_left_as_it_was():
    model = net()
    model.layers[0].requires_grad_(False)
    model.layers[1].eval()
    calls = []
    model.layers[2].register_forward_hook(lambda *_: calls.append(1))
    before, modes = bits(model), [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    hooks = [len(m._forward_hooks) for m in model.modules()]
    pre_hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    random = torch.get_rng_state()
    project = Project(net, Whole())
    strategy = LoLaDeft(model)
    strategy._served.prepare(exchanged(project))
    assert same(bits(model), before)
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert [len(m._forward_pre_hooks) for m in model.modules()] == pre_hooks
    assert torch.equal(torch.get_rng_state(), random)


def test_a_devices_model_is_left_as_it_was():
    project = Project(probe, Whole())
    run(project, legacy=False, rounds=1)
    for model in project.seen:
        flags = {n for n, p in model.named_parameters() if p.requires_grad}
        assert flags == {"head.weight", "head.bias"}
        assert not any(m._forward_pre_hooks for m in model.modules())
    assert len(project.seen) == 3


def test_a_client_that_is_not_touched_at_all(caplog):
    project = Project(net, Whole(), blocks=False)
    _, records, _ = run(project, legacy=False, rounds=2)
    assert [record.refused for record in records] == [{}, {}]
    said = [r for r in caplog.records if "state no profile" in r.getMessage()]
    assert len(said) == 1


@pytest.mark.parametrize("legacy", rest_slow([False, True], fast=0))
def test_the_clients_own_app_under_fedavg(legacy):
    """A migrated client without its block trains under Flower's strategy as before."""
    mine = Project(net, Whole(), prepares=False)
    plain = Project(net, Whole(), blocks=False)
    _, _, arrays = run(mine, legacy=legacy, plain=True)
    _, _, expected = run(plain, legacy=legacy, plain=True)
    # FedAvg adds in the order in which it samples; of whole numbers it keeps the floor.
    for name, values in expected.items():
        if name.endswith("tracked"):
            continue
        np.testing.assert_allclose(arrays[name], values, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_client_without_its_block_trains_all_and_returns_the_block():
    project = Project(net, Whole(), prepares=False)
    _, records, _ = run(project, legacy=False, rounds=1)
    assert not any(b.ignored_arrays for b in records[0].blocks)
    start = net().embed.weight
    assert not any(torch.equal(m.embed.weight, start) for m in project.seen)


def test_a_subclass_with_its_own_start_and_aggregation(tmp_path):
    class Kept(LoLaDeft):
        def __init__(self, path, *args, **options):
            super().__init__(*args, **options)
            self.path, self.seen = path, []

        def start(self, grid, initial_arrays, **options):
            self.seen.append("start")
            return super().start(grid, initial_arrays, **options)

        def configure_train(self, server_round, arrays, config, grid):
            config["lr"] = 0.5 / server_round
            return super().configure_train(server_round, arrays, config, grid)

        def aggregate_train(self, server_round, replies):
            arrays, metrics = super().aggregate_train(server_round, replies)
            if arrays is not None:
                torch.save(arrays.to_torch_state_dict(), self.path)
                metrics["kept"] = 1.0
            self.seen.append(server_round)
            return arrays, metrics

    project = Project(net, Whole())
    path = tmp_path / "model.pt"
    strategy = Kept(path, net(), fraction_train=1.0)
    result, grid = run_message(project, strategy)
    assert strategy.seen == ["start", 1, 2]
    saved = torch.load(path)
    assert same(saved, result.arrays.to_torch_state_dict())
    assert [m["kept"] for m in result.train_metrics_clientapp.values()] == [1.0, 1.0]
    told = [m for m in grid.sent if m.metadata.message_type == "train"]
    assert {m.content["config"]["lr"] for m in told} == {0.5, 0.25}


def test_a_part_of_the_state_dict_is_recognised():
    model = net()
    state = {n: v.numpy() for n, v in model.state_dict().items()}

    def recognised(names, *, other=False):
        source = {n: np.zeros_like(v) for n, v in state.items()} if other else state
        return [*names_of_list(model, [source[n] for n in names])]

    parameters = [n for n, _ in model.named_parameters()]
    body = [n for n in state if not n.startswith("head")]
    for names in ([*state], parameters):
        assert recognised(names) == recognised(names, other=True) == names
    assert recognised(body, other=True) == body
    linear = [n for n in state if n.startswith("layers.1.linear")]
    assert recognised(linear) == linear, "by its values"
    with pytest.raises(UserError, match=r"list of 2 initial .* pass exchanged=\["):
        recognised(linear, other=True)
    frozen = probe()
    head = [state["head.weight"] + 1, state["head.bias"]]
    assert names_of_list(frozen, head) == ("head.weight", "head.bias")


def test_names_that_no_model_has():
    strategy = LoLaDeft(net())
    arrays = {**exchanged(Project(net, Whole())), "x": np.zeros(3)}
    with pytest.raises(UserError, match="Initial arrays: x is unknown in the model"):
        strategy._served.prepare(arrays)
    with pytest.raises(UserError, match=r"head\.bias has shape \(2,\); expected"):
        strategy._served.prepare({"head.bias": np.zeros(2, np.float32)})
    with pytest.raises(UserError, match=r"Nothing of what is trained .* is exchanged"):
        LoLaDeft(probe())._served.prepare({"embed.bias": np.zeros(4, np.float32)})


@pytest.mark.slow
def test_a_list_whose_names_are_given():
    project = Project(net, Some("linear", has=True))
    names = [n for n in net().state_dict() if "linear" in n]
    _, records, arrays = run(project, legacy=True, rounds=1, exchanged=names)
    assert [*arrays] == names
    assert [record.refused for record in records] == [{}]


@pytest.mark.slow
def test_the_first_arrays_are_a_clients_where_none_are_given():
    project = Project(net, Whole())
    _, records, arrays = run(project, legacy=True, rounds=1, initial_parameters=None)
    assert [record.refused for record in records] == [{}]
    given, _, expected = run(project, legacy=True, rounds=1)
    assert given.result.losses_distributed
    assert not moved(expected, arrays)


@pytest.mark.slow
def test_the_servers_model_keeps_its_values_through_the_rounds():
    model = net()
    before = bits(model)
    run_message(Project(net, Whole()), LoLaDeft(model))
    assert same(bits(model), before)


@pytest.mark.parametrize("legacy", rest_slow([False, True]))
def test_a_projects_own_words_keep_their_meaning(legacy):
    """Its configuration and metrics may have keys of an assignment, or a report."""
    own = {"batch-size": 64, "codec": "mine", "lr": 0.1}
    project = Project(net, Whole())
    project.metrics = {"loss": 7.0, "block-index": 9.0}
    if legacy:
        grid, records, _ = run(
            project,
            legacy=True,
            on_fit_config_fn=lambda _: own,
            fit_metrics_aggregation_fn=lambda said: said[0][1],
        )
        by_name = grid.result.metrics_distributed_fit
        assert {name: by_name[name][0][1] for name in project.metrics} == {
            "loss": 7.0,
            "block-index": 9.0,
        }
        assert not any(name.startswith("lola-") for name in by_name)
    else:
        records = []
        strategy = LoLaDeft(net(), on_round=records.append)
        run_message(project, strategy, train_config=ConfigRecord(own))
    assert [record.refused for record in records] == [{}, {}]
    assert [own.items() <= config.items() for config in project.configs] == [True] * 6
    assert [config["server-round"] for config in project.configs] == [1] * 3 + [2] * 3


def test_a_strategy_without_a_model():
    with pytest.raises(UserError, match=r"given 0\.5; give it the model before FedAvg"):
        LoLaDeft(0.5)


@pytest.mark.slow
def test_clipping_on_the_devices_around_a_projects_strategy():
    """Flower's wrapper has a start of its own; its mod wants whole models."""
    project = Project(net, Whole(), mods=[fixedclipping_mod])
    records = []
    strategy = DifferentialPrivacyClientSideFixedClipping(
        LoLaDeft(net(), fraction_evaluate=0.0, on_round=records.append),
        noise_multiplier=0.0,
        clipping_norm=1e-3,
        num_sampled_clients=3,
    )
    _, grid = run_message(project, strategy)
    assert [record.refused for record in records] == [{}, {}]
    start = exchanged(project)
    replies = [r for r in grid.replies if r.metadata.message_type == "train"]
    for reply in replies[:3]:
        moves = [
            np.square(
                codec_named("fp16").decode(array.numpy(), start[name].shape)
            ).sum()
            for name, array in reply.content["arrays"].items()
            if "running" not in name and "batches" not in name
        ]
        assert 0 < np.sqrt(sum(moves)) <= 1e-3 * 1.01


def test_a_block_without_a_gradient_is_refused_with_its_reason():
    """As under re-entrant checkpointing: no weights come back that nobody trained."""

    class Unrecorded(Project):
        def trained(self, model, received):
            for layer in model.layers:
                layer.forward = torch.no_grad()(layer.forward)
            return super().trained(model, received)

    project = Unrecorded(net, Whole())
    strategy = LoLaDeft(net())
    grid = grid_of(project.app(), 3)
    errors = []

    def noted(reply):
        if reply.has_error():
            errors.append(reply.error.reason)
        return reply

    grid.alter = noted
    strategy.start(grid, ArrayRecord(net().state_dict()), num_rounds=1)
    assert sum("NoGradient" in error for error in errors) == 3


def halving(base, averages):
    """A subclass that keeps half of what a run has learned, or averages by itself."""

    class Halved(base):
        def aggregate_train(self, server_round, replies):
            if averages:
                contents = [reply.content for reply in replies]
                return aggregate_arrayrecords(contents, self.weighted_by_key), None
            arrays, metrics = super().aggregate_train(server_round, replies)
            halved = _halved(self.from_values, [a.numpy() for a in arrays.values()])
            named = zip(arrays, halved, strict=True)
            return ArrayRecord({name: Array(array) for name, array in named}), metrics

        def aggregate_fit(self, server_round, results, failures):
            if averages:
                return results[0][1].parameters, {}
            parameters, metrics = super().aggregate_fit(server_round, results, failures)
            halved = _halved(self.from_values, parameters_to_ndarrays(parameters))
            return ndarrays_to_parameters(halved), metrics

    return Halved


def _halved(start, arrays):
    pairs = zip(start.values(), arrays, strict=True)
    return [np.asarray((s + a) / 2).astype(a.dtype) for s, a in pairs]


@pytest.mark.parametrize("averages", rest_slow([True, False]))
@pytest.mark.parametrize("legacy", rest_slow([False, True], fast=1))
def test_a_subclass_that_changes_what_is_aggregated(legacy, averages):
    project = Project(net, Whole())
    base = LegacyLoLaDeft if legacy else LoLaDeft
    options = {"initial_parameters": initial(project)} if legacy else {}
    strategy = halving(base, averages)(net(), **options)
    strategy.from_values = exchanged(project)
    play = run_legacy if legacy else run_message
    if averages:
        with pytest.raises(UserError, match="Halved aggregates without LoLaDeft"):
            play(project, strategy)
        return
    whole = Project(net, Whole())
    play(project, strategy)
    play(whole, base(net(), **options))
    start = net().state_dict()
    # What devices are sent in the second round.
    for name, values in project.received[3].items():
        if values.is_floating_point():
            expected = (start[name] + whole.received[3][name]) / 2
            torch.testing.assert_close(values, expected)
            assert not torch.equal(values, start[name])


class Still(Project):
    """A project whose rounds move nothing, as with a learning rate that begins at 0."""

    def trained(self, model, received):
        self.received.append(bits(model))
        return 0.5


@pytest.mark.parametrize("legacy", rest_slow([False, True]))
def test_devices_that_hold_everything_are_sent_nothing(legacy):
    project = Still(net, Whole())
    grid, records, _ = run(project, legacy=legacy, rounds=3)
    assert [record.refused for record in records] == [{}, {}, {}]
    assert len(project.received) == 9
    start = bits(net())
    assert all(same(received, start) for received in project.received)
    first, _, _ = run(Still(net, Whole()), legacy=legacy, rounds=1)
    assert grid.sent_bytes["train"] == first.sent_bytes["train"] > 0
